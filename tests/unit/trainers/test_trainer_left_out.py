"""What is left out, of a model: batches without a finite loss, and everything after it was stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mb_torch import ModelBatch, OptimizerFactory
from tests.compare import assert_close, assert_equal
from tests.training_runs import make_loader
from trainers.config.errors import ConfigurationError
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.kept_buffers import KeptBuffers
from trainers.per_model import PerModel
from trainers.schedules import StoppedGroups
from trainers.settings import GenericTrainerConfig

Batches = list[tuple[Tensor, Tensor]]


class Counting(nn.Module):
    """Replaces a buffer instead of writing to it."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls = self.calls + inputs.sum().detach()
        return inputs


class OwnStep(GenericTrainer):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return super().training_step(batch, batch_idx)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def _broken(batches: Batches) -> Batches:
    """With a batch of NaN after the second."""
    inputs, targets = batches[0]
    return [*batches[:2], (torch.full_like(inputs, torch.nan), targets), *batches[2:]]


@pytest.mark.parametrize("kind", ["single", "replaced", "torch", "jax"])
def test_a_skipped_batch_leaves_the_model_as_it_was(kind: str, tmp_path: Path) -> None:
    batches: Batches = make_loader("list")
    ends = []
    for name, data in (("whole", batches), ("broken", _broken(batches))):
        torch.manual_seed(0)
        model: nn.Module = _model()
        if kind == "replaced":
            model = nn.Sequential(Counting(), model)
        elif kind != "single":
            model = ModelBatch([_model() for _ in range(3)], backend=kind)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        config = GenericTrainerConfig(checkpoint_dir=str(tmp_path / name), max_epochs=2, on_nan_loss="skip")
        OwnStep(config, loss_fn=nn.functional.mse_loss).fit(model, optimizer, data)
        ends.append({key: value.clone() for key, value in model.state_dict().items()})
    assert any("running_mean" in key for key in ends[0])
    assert_equal(ends[1], ends[0])


class Masked(nn.Module):
    """With an expanded buffer, which PyTorch does not write to, though to what it repeats."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("mask", torch.ones(3, 1).expand(3, 4).t())
        self.first = self.mask[0]

    def forward(self, inputs: Tensor) -> Tensor:
        self.first.data.add_(inputs.mean())
        return self.linear(inputs * self.mask[:1])


def test_a_skipped_batch_leaves_an_expanded_buffer_as_it_was(tmp_path: Path) -> None:
    ends = []
    batches: Batches = make_loader("list")
    for name, data in (("whole", batches), ("broken", _broken(batches))):
        torch.manual_seed(0)
        model = Masked()
        config = GenericTrainerConfig(checkpoint_dir=str(tmp_path / name), max_epochs=2, on_nan_loss="skip")
        OwnStep(config, loss_fn=nn.functional.mse_loss).fit(model, torch.optim.SGD(model.parameters(), 0.1), data)
        assert model.mask.stride() == (0, 1)
        ends.append({key: value.clone() for key, value in model.state_dict().items()})
    assert_equal(ends[1], ends[0])


def test_buffers_are_copied_to_the_same_place_every_time() -> None:
    kept = KeptBuffers(_model())
    kept.keep()
    before = [copied.data_ptr() for copied in kept._copies]
    kept.keep()
    assert [copied.data_ptr() for copied in kept._copies] == before
    empty = KeptBuffers(nn.Linear(1, 1))
    empty.keep()
    empty.put_back()


@pytest.mark.parametrize("is_expanded", [False, True])
def test_a_buffer_of_inference_mode_is_put_back(is_expanded: bool) -> None:
    model = nn.Module()
    with torch.inference_mode():
        model.register_buffer("mask", torch.ones(1, 2).expand(3, 2) if is_expanded else torch.ones(3, 2))
    before = model.mask
    kept = KeptBuffers(model)
    kept.keep()
    with torch.inference_mode():
        model.mask[:1].zero_()
    kept.put_back()
    assert model.mask is before
    assert model.mask.equal(torch.ones(3, 2))


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_stop_says_that_weights_are_broken_already(backend: str, accumulate: int, tmp_path: Path) -> None:
    batch = ModelBatch([nn.Linear(3, 1) for _ in range(2)], backend=backend)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, [{"lr": 0.1}] * 2)
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), gradient_accumulation_steps=accumulate)
    trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
    with pytest.raises(TrainerError, match="batch 2: the loss of models: received {0: nan, 1: nan}") as raised:
        trainer.fit(batch, optimizer, _broken(make_loader("list")))
    # Of an incomplete accumulation nothing was applied yet.
    is_broken = "weights are not finite either (weight, bias)" in str(raised.value)
    assert is_broken == (accumulate == 1)
    assert not is_broken or "load_checkpoint" in str(raised.value)
    assert "on_nan_loss='freeze'" in str(raised.value)


def test_groups_of_stopped_models_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    rates = [0.1, torch.tensor(0.1), 0.1]
    optimizer = torch.optim.Adam([{"params": [own], "lr": rate} for own, rate in zip(parameters, rates, strict=True)])
    groups = StoppedGroups(optimizer)
    copied: list[Any] = []
    deepcopy = copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda value, *rest: copied.append(value) or deepcopy(value, *rest))
    for stopped in ([0], [0, 1], [0, 1]):
        copied.clear()
        with groups.kept(stopped):
            optimizer.param_groups[0].update(lr=7.0, betas=(0.0, 0.0))
            # As schedulers of torch do with a tensor.
            optimizer.param_groups[1]["lr"].mul_(0.5)
            optimizer.param_groups[2]["lr"] *= 0.5
        assert not any("betas" in value or "eps" in value for value in copied)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1, 0.05, 0.0125])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("is_shared", [True, False])
def test_the_schedule_of_a_stopped_model_stands_still(interval: str, is_shared: bool, tmp_path: Path) -> None:
    batch = ModelBatch([nn.Linear(3, 1) for _ in range(2)])
    factory = OptimizerFactory(torch.optim.SGD)
    # The first one learns nothing, and stops after its second validation.
    optimizer = factory.create_optimizer(batch, [{"lr": 1e-30}, {"lr": 0.01}])
    exponential = torch.optim.lr_scheduler.ExponentialLR
    scheduler = exponential(optimizer, 0.5)
    schedulers = factory.create_lr_scheduler(optimizer, exponential, [{"gamma": 0.5}] * 2)
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=5, scheduler_interval=interval)
    trainer = GenericTrainer(
        config, loss_fn=nn.functional.mse_loss, per_model=PerModel(early_stopping_patience=[1, None])
    )
    batches = make_loader("list")
    trainer.fit(batch, optimizer, batches, batches, scheduler if is_shared else schedulers)
    assert trainer.stopped_models.keys() == {0}
    steps = 1 if interval == "epoch" else len(batches)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-30 * 0.5 ** (2 * steps), 0.01 * 0.5 ** (5 * steps)], rel=1e-9, abs=0)
    if not is_shared:
        assert [own.last_epoch for own in schedulers] == [2 * steps, 5 * steps]


class OwnSteps(GenericTrainer):
    """What the fused step does, by autograd."""

    reduction = "none"

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self._losses(batch, "sum")}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"val_loss": self._losses(batch, self.reduction)}

    def _losses(self, batch: Any, reduction: str) -> Tensor:
        inputs, targets = batch
        return self.model.compute_loss(self.model(inputs), targets, nn.functional.mse_loss, reduction=reduction)


def _fit_with_early_stopping(
    trainer_class: type[GenericTrainer], folder: Path, backend: str = "torch", epochs: int = 8
) -> tuple[GenericTrainer, dict[str, Any]]:
    torch.manual_seed(0)
    batch = ModelBatch([_model() for _ in range(3)], backend=backend)
    configs = [{"lr": rate, "weight_decay": 0.1} for rate in (0.0003, 1.0, 0.01)]
    optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, configs)
    config = GenericTrainerConfig(
        checkpoint_dir=str(folder), max_epochs=epochs, early_stopping_patience=1, max_grad_norm=1.0
    )
    trainer = trainer_class(config, loss_fn=None if trainer_class is OwnSteps else nn.functional.mse_loss)
    batches = make_loader("list")
    trainer.fit(batch, optimizer, batches, batches)
    return trainer, copy.deepcopy({"model": batch.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_models_stop_one_by_one_in_ones_own_step(backend: str, tmp_path: Path) -> None:
    fused, expected = _fit_with_early_stopping(GenericTrainer, tmp_path / "fused", backend)
    own, state = _fit_with_early_stopping(OwnSteps, tmp_path / "own", backend)
    assert 0 < len(own.stopped_models) < 3
    assert own.stopped_models.keys() == fused.stopped_models.keys()
    assert own.global_step == fused.global_step
    assert_close(state, expected, rtol=1e-3, atol=1e-4)


def test_models_that_stopped_in_ones_own_step_stay_so_after_a_resume(tmp_path: Path) -> None:
    _, expected = _fit_with_early_stopping(OwnSteps, tmp_path / "whole")
    part, _ = _fit_with_early_stopping(OwnSteps, tmp_path / "part", epochs=5)
    assert part.stopped_models
    _, state = _fit_with_early_stopping(OwnSteps, tmp_path / "part")
    assert_equal(state, expected)


def test_early_stopping_of_a_batch_needs_a_value_of_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnSteps, "reduction", "sum")
    with pytest.raises(TrainerError, match=r"one value for all models; expected a tensor \[3\]"):
        _fit_with_early_stopping(OwnSteps, tmp_path)


def test_early_stopping_of_a_batch_needs_an_optimizer_that_leaves_models_out(tmp_path: Path) -> None:
    batch = ModelBatch([_model() for _ in range(2)])
    trainer = OwnSteps(GenericTrainerConfig(checkpoint_dir=str(tmp_path), early_stopping_patience=1))
    with pytest.raises(ConfigurationError, match="made by OptimizerFactory"):
        trainer.fit(batch, torch.optim.SGD(batch.parameters(), lr=0.1), make_loader("list"), make_loader("list"))
