"""What counts as a metric, and what the logs of many models are means of."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mb_torch import ModelBatch, OptimizerFactory
from tests.training_runs import make_loader
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.per_model import PerModel
from trainers.reporting.early_stopping import EarlyStopping
from trainers.settings import GenericTrainerConfig


def _objects(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    if kind == "single":
        model = nn.Linear(3, 1)
        return model, torch.optim.SGD(model.parameters(), 0.01)
    batch = ModelBatch([nn.Linear(3, 1) for _ in range(3)])
    return batch, OptimizerFactory(torch.optim.SGD).create_optimizer(batch, [{"lr": 0.01}] * 3)


def _fit(
    folder: Path, kind: str, metric: Callable[[Any, Any], Any], trainer_class: type[GenericTrainer] = GenericTrainer
) -> GenericTrainer:
    config = GenericTrainerConfig(checkpoint_dir=str(folder), max_epochs=1)
    trainer = trainer_class(config, loss_fn=nn.functional.mse_loss, metrics={"own": metric})
    trainer.fit(*_objects(kind), make_loader("list"), make_loader("list"))
    return trainer


@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize(
    "value", [3, 3.0, np.float32(3), np.int64(3), np.array(3.0), torch.tensor(3), torch.tensor([[3.0]])], ids=repr
)
def test_metrics_may_be_plain_numbers(value: Any, kind: str, tmp_path: Path) -> None:
    trainer = _fit(tmp_path, kind, lambda outputs, targets: value)
    assert trainer.logs["own"] == trainer.logs["val_own"] == 3.0
    if kind == "batch":
        assert trainer.model_metrics["own"] == [3.0] * 3


@pytest.mark.filterwarnings("ignore:the loss cannot be batched")
def test_a_number_is_that_of_its_model(tmp_path: Path) -> None:
    def error(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    plain = _fit(tmp_path / "plain", "batch", lambda outputs, targets: error(outputs, targets).item())
    tensors = _fit(tmp_path / "tensors", "batch", error)
    assert len(set(plain.model_metrics["own"])) == 3
    assert plain.model_metrics["own"] == pytest.approx(tensors.model_metrics["own"], rel=1e-6)


@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize(
    ("value", "named"), [(torch.ones(4), r"tensor \[4\]"), (None, "NoneType"), ("3", "str"), (np.ones(2), "ndarray")]
)
def test_a_metric_that_is_no_number_is_named(value: Any, named: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=rf"metrics\['own'\]: received a {named}; expected a number"):
        _fit(tmp_path, kind, lambda outputs, targets: value)


def test_numbers_of_numpy_are_metrics_of_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Own(GenericTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            own = {"array": np.array([2.0]), "truth": np.bool_(True), "whole": np.int8(4), "text": np.array("2")}
            return {**super().training_step(batch, batch_idx), **own}

    with caplog.at_level(logging.WARNING):
        logs = _fit(tmp_path, "single", lambda outputs, targets: 1, Own).logs
    assert (logs["array"], logs["truth"], logs["whole"]) == (2.0, 1.0, 4.0)
    assert ["'text' is left out" in message for message in caplog.messages] == [True]


def test_means_over_batches_are_not_weighted(tmp_path: Path) -> None:
    """The last batch of 14 rows in batches of 4 has 2 rows, and counts as much as the others."""
    sizes = [len(inputs) for inputs, _ in make_loader("list")]
    assert sizes == [4, 4, 4, 2]
    assert _fit(tmp_path, "single", lambda outputs, targets: len(outputs)).logs["val_own"] == 3.5


def test_models_that_stopped_early_count_in_means_and_diverged_ones_do_not(tmp_path: Path) -> None:
    """Model 0 is the best and stops, model 1 goes on, model 2 diverges."""
    batch = ModelBatch([nn.Linear(3, 1) for _ in range(3)])
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, [{"lr": 0.0}, {"lr": 0.01}, {"lr": 1e30}])
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=4, on_nan_loss="freeze", max_grad_norm=None)
    trainer = GenericTrainer(
        config, loss_fn=nn.functional.mse_loss, per_model=PerModel(early_stopping_patience=[1, None, None])
    )
    trainer.fit(batch, optimizer, make_loader("list"), make_loader("list"))
    assert (sorted(trainer.stopped_models), trainer.diverged_models) == ([0, 2], {2})
    for key in ("loss", "val_loss"):
        first, second, third = trainer.model_metrics[key]
        assert not math.isfinite(third)
        assert trainer.logs[key] == pytest.approx((first + second) / 2)
    again = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
    again.fit(batch, optimizer, make_loader("list"), make_loader("list"))
    assert again.diverged_models == {2}


def test_whether_a_model_diverged_does_not_hang_on_a_text() -> None:
    early = EarlyStopping([1, 1, 1], "min")
    early.stop_diverged(1, math.nan, 7)
    early.stopped[2] = "its loss was no better than before"
    assert early.counted().tolist() == [True, False, True]  # type: ignore[union-attr]
    restored = EarlyStopping([1, 1, 1], "min")
    restored.load_state_dict(early.state_dict())
    assert restored.diverged == {1}
    # Checkpoints of earlier versions do not say it in another way.
    state = {key: value for key, value in early.state_dict().items() if key != "diverged"}
    restored.load_state_dict({**state, "stopped": {1: early.stopped[1]}})
    assert restored.diverged == {1}
