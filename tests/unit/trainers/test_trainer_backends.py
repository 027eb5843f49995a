"""A run that is stopped on one backend goes on on another, and ends like one that stayed where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mb_torch import ModelBatch, OptimizerFactory, create_adam_configs
from tests.compare import assert_close
from tests.training_runs import Recorder, Rows
from trainers.settings import GenericTrainerConfig

RATES = [0.01, 0.02, 0.03]


def _model() -> nn.Module:
    # Nothing random: a random stream is that of a backend.
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


def _batches(dtype: torch.dtype) -> list[Any]:
    rows = Rows()
    return list(zip(rows.inputs.to(dtype).split(4), rows.targets.to(dtype).split(4), strict=True))


def _run(folder: Path, backend: str, optimizer: str, stop_at: int | None, notes: dict[str, Any]) -> Recorder:
    """Three epochs of three models with schedulers; the same trainer code whatever the backend."""
    dtype = torch.float64 if optimizer == "adam" else torch.float32
    torch.manual_seed(3)
    models = [_model().to(dtype) for _ in RATES]
    batch = ModelBatch(models, backend=backend)
    if optimizer == "adam":
        factory = OptimizerFactory(torch.optim.Adam)
        stacked = factory.create_optimizer(batch, create_adam_configs(RATES))
    else:
        factory = OptimizerFactory(torch.optim.SGD)
        stacked = factory.create_optimizer(batch, [{"lr": rate, "momentum": 0.9} for rate in RATES])
    schedulers = factory.create_lr_scheduler(
        stacked, torch.optim.lr_scheduler.StepLR, [{"step_size": 1, "gamma": 0.5}] * len(RATES)
    )
    config = GenericTrainerConfig(checkpoint_dir=str(folder), max_epochs=3, early_stopping_patience=3)
    trainer = Recorder(config, notes, stop_at)
    batches = _batches(dtype)
    trainer.fit(batch, stacked, batches, batches[:2], schedulers)
    return trainer


def _end(trainer: Recorder) -> dict[str, Any]:
    return {
        "models": [dict(state) for state in trainer.model.get_model_states()],
        "optimizers": [trainer.optimizer.model_state_dict(index) for index in range(len(RATES))],
        "metrics": trainer.model_metrics,
        "losses": [torch.tensor(losses, dtype=torch.float64) for _, _, losses in trainer.notes["samples"]],
        "steps": trainer.global_step,
        "rates": [scheduler.state_dict()["_last_lr"] for scheduler in trainer.scheduler],
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "backends",
    [("torch", "jax"), ("jax", "torch"), pytest.param(("torch", "jax", "torch", "jax"), marks=pytest.mark.long)],
    ids="-".join,
)
@pytest.mark.parametrize("event", [1, pytest.param(5, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_stopped_on_one_and_resumed_on_another(
    backends: tuple[str, ...], optimizer: str, event: int, tmp_path: Path
) -> None:
    # The middle of an epoch, its last validation batch, and the end of its training.
    whole = _end(_run(tmp_path / "whole", "torch", optimizer, None, {}))
    notes: dict[str, Any] = {}
    for number, backend in enumerate(backends):
        is_last = number == len(backends) - 1
        notes["events"] = 0
        trainer = _run(tmp_path / "stopped", backend, optimizer, None if is_last else event, notes)
        assert trainer.preempted is not is_last
        assert trainer.model.backend_report()["backend"] == backend
    assert len(notes["samples"]) == 12
    ended = _end(trainer)
    bounds = {"atol": 1e-9, "rtol": 1e-9} if optimizer == "adam" else {}
    assert_close(ended, whole, **bounds)
