"""Small populations that can be stopped anywhere, and all that they end with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mb_torch import ModelBatch, OptimizerFactory
from trainers.callbacks import TrainingCallback
from trainers.population import Halving, Population
from trainers.settings import GenericTrainerConfig
from trainers.states import capture_rng_state, rng_to_dict

NAMES = ["tiny", "small", "medium", "large", "huge"]
RATES = [0.0003, 0.001, 0.1, 0.003, 0.03]
BATCHES = 3  # of an epoch


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return inputs, inputs.sum(1, keepdim=True).sin() + 0.1 * torch.randn(count, 1, generator=generator)


def train_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(4 * BATCHES, seed=1)), 4, shuffle=True)


def val_batches() -> list[Any]:
    inputs, targets = rows(8, seed=2)
    return list(zip(inputs.split(4), targets.split(4), strict=True))


def make_models(count: int, *, dropout: float = 0.3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
        for _ in range(count)
    ]


def largest_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).abs().max()


class StopAt(TrainingCallback):
    """Stops a run, in whatever way, at the end of some batch or epoch of this process, counted from 0."""

    def __init__(self, *, batch: int | None = None, epoch: int | None = None, error: Exception | None = None) -> None:
        self.batch, self.epoch, self.error = batch, epoch, error
        self.batches = 0

    def stop(self, trainer: Any) -> None:
        if self.error is not None:
            raise self.error
        trainer.request_preemption()

    def on_batch_end(self, trainer: Any, batch_idx: int, logs: dict[str, Any]) -> None:
        if self.batches == self.batch:
            self.stop(trainer)
        self.batches += 1

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, Any]) -> None:
        if epoch == self.epoch:
            self.stop(trainer)


def make_population(
    folder: Path,
    *,
    kind: str = "adam",
    backend: str = "torch",
    rates: list[float] = RATES,
    names: list[str] | None = NAMES,
    loss_fn: Any = nn.functional.mse_loss,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Population:
    """Models with dropout, each with a seed, a rate and a schedule of its own."""
    batch = ModelBatch(make_models(len(rates)), seeds=list(range(len(rates))), backend=backend)
    classes: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    factory = OptimizerFactory(classes[kind])
    extra = {"momentum": 0.9} if kind == "sgd" else {}

    def make_optimizer(batch: ModelBatch, models: list[int]) -> Any:
        optimizer = factory.create_optimizer(batch, [{"lr": rates[model], **extra} for model in models])
        steps = [{"step_size": 1, "gamma": 0.9 - 0.1 * model} for model in models]
        return optimizer, factory.create_lr_scheduler(optimizer, torch.optim.lr_scheduler.StepLR, steps)

    config = GenericTrainerConfig(
        **{"checkpoint_dir": str(folder), "max_epochs": 4, "max_grad_norm": None, "seed": 3, **(settings or {})}
    )
    return Population(
        batch,
        make_optimizer,
        loss_fn=loss_fn,
        names=names,
        config=config,
        metrics={"error": largest_error},
        **options,
    )


def fit(population: Population, halving: Halving | None = None, *callbacks: TrainingCallback) -> Population:
    for callback in callbacks:
        population.add_callback(callback)
    # Whatever the generators were at: the seed is in the config.
    torch.rand(7)
    population.fit(train_loader(), val_batches(), halving=halving)
    return population


def ends(population: Population) -> dict[str, Any]:
    """Everything that must not depend on whether a run was stopped."""
    trainer, history = population.trainer, population.history
    return {
        "table": population.table(),
        "history": history.state_dict(),
        "models": {name: dict(population.model(name).state_dict()) for name in history.models},
        "optimizers": [trainer.optimizer.model_state_dict(place) for place in range(len(history.models))],
        "schedulers": [scheduler.state_dict() for scheduler in trainer.scheduler],
        "streams": {key: value for key, value in trainer.model.state_dict().items() if key.startswith("streams")},
        "best": {} if population.best_models is None else population.best_models.state_dict(),
        "rng": rng_to_dict(capture_rng_state()),
        "steps": trainer.global_step,
        "logs": dict(trainer.logs),
        "stopped": dict(trainer.stopped_models),
        "phase": trainer.current_phase.value,
    }
