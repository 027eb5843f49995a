"""A checkpoint is loaded into model, optimizer and schedulers like those that wrote it, or changes none of them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, SequentialLR, StepLR

from mb_torch import ModelBatch, OptimizerFactory
from tests.training_runs import assert_identical, make_loader, make_objects, run
from trainers.callbacks import TrainingCallback
from trainers.checkpoints.objects import class_names
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig
from trainers.states import ResumeState, capture_rng_state, rng_to_dict


@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize("changed", ["model", "names", "optimizer", "scheduler", "nested", "schedulers"])
def test_other_objects_are_refused_and_left_as_they_were(changed: str, kind: str, tmp_path: Path) -> None:
    def fit(changed: str | None, load: bool = False) -> GenericTrainer:
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        makers = {"model": lambda: nn.Linear(3, 1, bias=False), "names": lambda: wide}
        make = makers.get(changed or "", lambda: nn.Linear(3, 1))
        model: Any = make() if kind == "single" else ModelBatch([make() for _ in range(2)])
        optimizer_class = torch.optim.AdamW if changed == "optimizer" else torch.optim.Adam
        optimizer: Any = optimizer_class(model.parameters(), lr=0.1)
        if kind == "batch":
            optimizer = OptimizerFactory(optimizer_class).create_optimizer(model, [{"lr": 0.1}] * 2)
        last: Any = ExponentialLR(optimizer, 0.5) if changed == "nested" else StepLR(optimizer, 1)
        scheduler: Any = SequentialLR(optimizer, [ConstantLR(optimizer), last], [1])
        scheduler = {"scheduler": StepLR(optimizer, 1), "schedulers": [scheduler] * 2}.get(changed or "", scheduler)
        config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=2 if changed is None else 3)
        trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
        trainer.model, trainer.optimizer, trainer.scheduler = model, optimizer, scheduler
        if changed is None:
            trainer.fit(model, optimizer, make_loader("list"), None, scheduler)
            return trainer
        before = copy.deepcopy(_objects_of(trainer))
        start = trainer.load_checkpoint if load else trainer.fit
        with pytest.raises(TrainerError) as caught:
            start(*([] if load else [model, optimizer, make_loader("list"), None, scheduler]))
        messages.append(str(caught.value))
        assert_identical(_objects_of(trainer), before)
        return trainer

    messages: list[str] = []
    fit(None)
    fit(changed)
    fit(changed, load=True)
    expected = {
        "model": "epoch_001_step_000008.ckpt does not fit: received a",
        "names": "epoch_001_step_000008.ckpt does not fit: received a",
        "optimizer": r"epoch_001_step_000008.ckpt: received AdamW; expected Adam, as in the run",
        "scheduler": r"the scheduler 0 at .* received StepLR; expected SequentialLR\(ConstantLR, StepLR\)",
        "nested": r"received SequentialLR\(ConstantLR, ExponentialLR\); expected",
        "schedulers": "schedulers at resume: received 2; expected 1",
    }[changed]
    assert len(messages) == 2
    for message in messages:
        assert re.search(expected, message)


def _objects_of(trainer: GenericTrainer) -> dict[str, Any]:
    schedulers = trainer.scheduler if isinstance(trainer.scheduler, list) else [trainer.scheduler]
    return {
        "model": dict(trainer.model.state_dict()),
        "optimizer": trainer.optimizer.state_dict(),
        "schedulers": [
            {key: value for key, value in scheduler.state_dict().items() if key != "_schedulers"}
            for scheduler in schedulers
        ],
        "rng": rng_to_dict(capture_rng_state()),
    }


def test_after_a_load_that_failed_the_same_checkpoint_is_loaded(tmp_path: Path) -> None:
    run(tmp_path, save_top_k=-1)
    trainer = GenericTrainer(
        GenericTrainerConfig(checkpoint_dir=str(tmp_path / "new"), max_epochs=1), loss_fn=nn.functional.mse_loss
    )
    trainer.load_checkpoint(tmp_path / "epoch_000_step_000004.ckpt")
    wrong = nn.Linear(3, 1)
    with pytest.raises(TrainerError, match="schedulers at resume"):
        trainer.fit(wrong, torch.optim.Adam(wrong.parameters()), make_loader("list"))
    model, optimizer, scheduler = make_objects("single")
    trainer.fit(model, optimizer, make_loader("shuffled"), make_loader("list")[:2], scheduler)
    assert trainer.global_step == 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError("no room")])
def test_a_lack_of_memory_is_not_taken_for_other_objects(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, max_epochs=1)
    trainer = GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path)), loss_fn=nn.functional.mse_loss)
    trainer.model, trainer.optimizer, trainer.scheduler = make_objects("single")
    before = copy.deepcopy(_objects_of(trainer))
    load = trainer.optimizer.load_state_dict

    def fails_once(state: dict[str, Any]) -> None:
        monkeypatch.setattr(trainer.optimizer, "load_state_dict", load)
        raise error

    monkeypatch.setattr(trainer.optimizer, "load_state_dict", fails_once)
    with pytest.raises(type(error), match="no room"):
        trainer.load_checkpoint()
    assert_identical(_objects_of(trainer), before)


@pytest.mark.parametrize("place", [0, 1])
def test_a_scheduler_that_fails_to_load_leaves_all_as_they_were(place: int, tmp_path: Path) -> None:
    class Refusing(StepLR):
        refuses = False

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if self.refuses:
                raise ValueError("not this one")
            super().load_state_dict(state_dict)

    def fit(*, refuses: bool) -> GenericTrainer:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.Adam(model.parameters())
        schedulers = [StepLR(optimizer, 1), StepLR(optimizer, 1)]
        schedulers[place] = Refusing(optimizer, 1)
        schedulers[place].refuses = refuses
        config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=2 if refuses else 1)
        trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
        trainer.model, trainer.optimizer, trainer.scheduler = model, optimizer, schedulers
        before = copy.deepcopy(_objects_of(trainer))
        start = [model, optimizer, make_loader("list"), None, schedulers]
        if not refuses:
            trainer.fit(*start)
            return trainer
        for load in (trainer.load_checkpoint, lambda: trainer.fit(*start)):
            with pytest.raises(TrainerError, match="does not fit: .*not this one"):
                load()
            assert_identical(_objects_of(trainer), before)
        return trainer

    fit(refuses=False)
    fit(refuses=True)


class Choosy(TrainingCallback):
    """May refuse its state once; notes from where a run goes on."""

    refuses = False
    steps: list[int]

    def on_resume_from_checkpoint(self, trainer: GenericTrainer, resume_state: ResumeState) -> None:
        self.steps.append(resume_state.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses:
            self.refuses = False
            raise ValueError("not yet")


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_callback_that_fails_to_load_leaves_all_as_they_were(is_complete: bool, tmp_path: Path) -> None:
    choosy = Choosy()

    def start(folder: Path, epochs: int) -> tuple[GenericTrainer, list[Any]]:
        model, optimizer, scheduler = make_objects("single")
        config = GenericTrainerConfig(checkpoint_dir=str(folder), max_epochs=epochs, save_top_k=-1)
        trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
        trainer.add_callback(choosy)
        return trainer, [model, optimizer, make_loader("list"), None, scheduler]

    trainer, objects = start(tmp_path / "given", 1 if is_complete else 2)
    trainer.fit(*objects)
    # There is a later one in the folder than the one that is asked for.
    start(tmp_path / "later", 2)[0].fit(*objects)
    trainer, objects = start(tmp_path / "later", 1 if is_complete else 2)
    trainer.load_checkpoint(tmp_path / "given" / "epoch_000_step_000004.ckpt")
    trainer.model, trainer.optimizer, _, _, trainer.scheduler = objects
    before = copy.deepcopy(_objects_of(trainer))
    choosy.refuses = True
    with pytest.raises(ValueError, match="not yet"):
        trainer.fit(*objects)
    assert_identical(_objects_of(trainer), before)
    assert (trainer.global_step, trainer.logs, trainer.current_phase.name) == (0, {}, "INIT")
    choosy.steps = []
    trainer.fit(*objects)
    assert choosy.steps == ([] if is_complete else [4])
    assert trainer.global_step == (4 if is_complete else 8)


def test_checkpoints_that_do_not_say_the_classes(tmp_path: Path) -> None:
    run(tmp_path, max_epochs=1)
    path = tmp_path / "epoch_000_step_000004.ckpt"
    content = torch.load(path)
    del content["classes"]
    torch.save(content, path)
    assert run(tmp_path, max_epochs=2).global_step == 8


@pytest.mark.parametrize("backends", [("torch", "jax"), ("jax", "torch")])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam])
def test_a_batch_goes_on_with_the_same_class_on_the_other_backend(
    optimizer_class: type[torch.optim.Optimizer], backends: tuple[str, str], tmp_path: Path
) -> None:
    for epochs, backend in enumerate(backends, 1):
        batch = ModelBatch([nn.Linear(3, 1) for _ in range(2)], backend=backend)
        optimizer = OptimizerFactory(optimizer_class).create_optimizer(batch, [{"lr": 0.1}] * 2)
        config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=epochs)
        trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
        trainer.fit(batch, optimizer, make_loader("list"))
        assert trainer.global_step == 4 * epochs
        content = torch.load(tmp_path / "latest.ckpt", weights_only=False)
        assert content["classes"]["optimizer"] == optimizer_class.__name__
        assert class_names(optimizer_class(nn.Linear(1, 1).parameters()), [])["optimizer"] == optimizer_class.__name__
