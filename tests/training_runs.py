"""Small training runs that can be stopped anywhere, and the comparison to the bit of what they end with."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from mb_torch import ModelBatch, OptimizerFactory, create_adam_configs
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig
from trainers.states import capture_rng_state, rng_to_dict

ROWS, BATCH, EPOCHS = 14, 4, 3
LOADERS = ("list", "shuffled", "generator", "weighted", "iterable", "stream", "batch_sampler", "stateful", "subclass")


class Rows(Dataset):
    """Rows with random augmentation from all three generators; the first number says which row it is."""

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(rows, 3, generator=generator)
        self.targets = torch.randn(rows, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return self.inputs[index] + 0.1 * noise, self.targets[index]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        rows = Rows()
        return (rows[index] for index in range(len(rows)))


class OwnLoader(DataLoader):
    """A loader whose class may do anything."""


class Again:
    """An iterable that is no sequence, and draws its order anew in every epoch."""

    def __iter__(self) -> Iterator[Any]:
        rows = Rows()
        order = torch.randperm(len(rows))
        for chosen in order.split(BATCH):
            yield torch.stack([rows[int(i)][0] for i in chosen]), torch.stack([rows[int(i)][1] for i in chosen])


def _processes(workers: int) -> dict[str, Any]:
    """Options of a loader. Once JAX runs in this process, its threads must not be forked."""
    if not workers or "jax" not in sys.modules:
        return {"num_workers": workers}
    return {"num_workers": workers, "multiprocessing_context": "forkserver"}


def make_loader(kind: str, workers: int = 0) -> Any:
    options = _processes(workers)
    if kind == "list":
        rows = Rows()
        return list(zip(rows.inputs.split(BATCH), rows.targets.split(BATCH), strict=True))
    if kind == "iterable":
        return Again()
    if kind == "stream":
        return DataLoader(Stream(), batch_size=BATCH, **options)
    if kind == "weighted":
        sampler = WeightedRandomSampler(torch.arange(1.0, ROWS + 1), ROWS)
        return DataLoader(Rows(), batch_size=BATCH, sampler=sampler, **options)
    if kind == "batch_sampler":
        batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(ROWS)), BATCH, False)
        return DataLoader(Rows(), batch_sampler=batches, **options)
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            return StatefulDataLoader(Rows(), batch_size=BATCH, shuffle=True, **options)
    if kind == "subclass":
        return OwnLoader(Rows(), BATCH, shuffle=True, **options, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5) if kind == "generator" else None
    persistent = workers > 0
    return DataLoader(Rows(), BATCH, shuffle=True, **options, generator=generator, persistent_workers=persistent)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))


def make_objects(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Model, optimizer and scheduler: of one model, or of three in a batch; "xla" is a batch on that backend."""
    _seed()
    objects = _objects(kind)
    # The first batch on a backend imports packages that draw random numbers.
    _seed()
    return objects


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _objects(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    if kind == "single":
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    batch = ModelBatch([make_model() for _ in range(3)], backend="jax" if kind == "xla" else "torch")
    factory = OptimizerFactory(torch.optim.Adam)
    stacked = factory.create_optimizer(batch, create_adam_configs([0.01, 0.02, 0.03]))
    return batch, stacked, factory.create_lr_scheduler(stacked, torch.optim.lr_scheduler.StepLR, [{"step_size": 1}] * 3)


class Recorder(GenericTrainer):
    """Notes the samples and logs of a run, and stops it at one of its events.

    An event is the end of a training batch or a validation batch; ``stop_at`` counts them over the whole run.
    """

    def __init__(self, config: GenericTrainerConfig, notes: dict[str, Any], stop_at: int | None = None) -> None:
        super().__init__(config, loss_fn=nn.functional.mse_loss)
        self.notes = notes
        self.stop_at = stop_at
        for name in ("samples", "logs"):
            notes.setdefault(name, [])

    def stop(self) -> None:
        self.request_preemption()

    def _event(self) -> None:
        if self.notes.setdefault("events", 0) == self.stop_at:
            self.stop()
        self.notes["events"] += 1

    def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
        self.notes["samples"].append((self.current_epoch, batch_idx, torch.as_tensor(logs["loss"]).tolist()))
        self._event()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self._event()
        return super().validation_step(batch, batch_idx)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        self.notes["logs"].append((epoch, dict(logs)))


def run(
    folder: Path,
    kind: str = "single",
    *,
    loader: str = "shuffled",
    workers: int = 0,
    stop_at: int | None = None,
    notes: dict[str, Any] | None = None,
    trainer_class: type[Recorder] = Recorder,
    **settings: Any,
) -> Recorder:
    """Train in ``folder``, from the beginning or from the newest checkpoint there."""
    model, optimizer, scheduler = make_objects(kind)
    config = GenericTrainerConfig(**{"checkpoint_dir": str(folder), "max_epochs": EPOCHS, **settings})
    trainer = trainer_class(config, {} if notes is None else notes, stop_at)
    trainer.fit(model, optimizer, make_loader(loader, workers), make_loader("list")[:2], scheduler)
    return trainer


def run_state(trainer: GenericTrainer) -> dict[str, Any]:
    """Of any trainer, what must not depend on whether its run was stopped."""
    schedulers = trainer.scheduler if isinstance(trainer.scheduler, list) else [trainer.scheduler]
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "rng": rng_to_dict(capture_rng_state()),
        "steps": trainer.global_step,
        "logs": trainer.logs,
        "phase": trainer.current_phase.value,
        "model_metrics": trainer.model_metrics,
    }


def final_state(trainer: Recorder) -> dict[str, Any]:
    """Everything that must not depend on whether a run was stopped."""
    return {**run_state(trainer), "notes": {key: value for key, value in trainer.notes.items() if key != "events"}}


def assert_identical(actual: Any, expected: Any, where: str = "") -> None:
    """Raise AssertionError, naming the place, unless both are equal to the bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), where
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), f"{where}: {actual} != {expected}"
    elif isinstance(expected, dict):
        assert set(actual) == set(expected), f"{where}: {set(actual) ^ set(expected)}"
        for key, value in expected.items():
            assert_identical(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} != {len(expected)}"
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(one, other, f"{where}[{index}]")
    else:
        assert actual == expected, f"{where}: {actual!r} != {expected!r}"


class KilledAfterStep(Recorder):
    """Dies without farewell after the checkpoint of a step, when the next batch has been loaded."""

    def _event(self) -> None:
        """Nothing: what is counted here is steps."""

    def on_batch_start(self, batch_idx: int) -> None:
        if self.global_step == self.stop_at:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kind, step = sys.argv[1:]
    run(Path(folder), kind, stop_at=int(step), trainer_class=KilledAfterStep, save_every_n_steps=1)
