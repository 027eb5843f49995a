"""Seeds and deterministic algorithms: what they do, and that nothing of it outlasts a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.compare import assert_different, assert_equal
from tests.populations import StopAt, make_models, train_loader, val_batches
from trainers.generic import GenericTrainer
from trainers.reproducibility import algorithms, seed_everything
from trainers.settings import GenericTrainerConfig


class Observer(GenericTrainer):
    """Notes torch's settings, and draws from every generator, while it trains."""

    def __init__(self, config: GenericTrainerConfig) -> None:
        super().__init__(config, loss_fn=nn.functional.mse_loss)
        self.settings: list[dict[str, Any]] = []
        self.drawn: list[float] = []

    def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
        self.settings.append(_torch_settings())
        self.drawn += [random.random(), float(np.random.rand()), float(torch.rand(()))]


def _torch_settings() -> dict[str, Any]:
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "benchmark": torch.backends.cudnn.benchmark,
    }


def _run(folder: Path, *callbacks: Any, **settings: Any) -> Observer:
    config = GenericTrainerConfig(**{"checkpoint_dir": str(folder), "max_epochs": 2, **settings})
    trainer = Observer(config)
    for callback in callbacks:
        trainer.add_callback(callback)
    (model,) = make_models(1)
    # A process has drawn who knows how often before.
    for generator in (random.random, np.random.rand, torch.seed):
        generator()
    random.seed()
    np.random.seed()
    trainer.fit(model, torch.optim.SGD(model.parameters(), 0.1), train_loader(), val_batches())
    return trainer


def test_runs_with_one_seed_are_equal(tmp_path: Path) -> None:
    first, second, other, none = (
        _run(tmp_path / name, seed=seed) for name, seed in (("1", 5), ("2", 5), ("3", 6), ("4", None))
    )
    assert_equal(dict(second.model.state_dict()), dict(first.model.state_dict()))
    assert (second.logs, second.drawn) == (first.logs, first.drawn)
    for unlike in (other, none):
        assert_different(dict(unlike.model.state_dict()), dict(first.model.state_dict()))
        assert not set(unlike.drawn) & set(first.drawn)


@pytest.mark.parametrize("batch", [0, 2, 4])
def test_a_resumed_run_is_not_seeded_again(batch: int, tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", seed=5)
    first = _run(tmp_path / "stopped", StopAt(batch=batch), seed=5)
    assert first.preempted
    second = _run(tmp_path / "stopped", seed=5)
    assert first.drawn + second.drawn == whole.drawn
    assert_equal(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    # Nor by another seed.
    other = _run(tmp_path / "other", StopAt(batch=batch), seed=5)
    assert other.drawn + _run(tmp_path / "other", seed=6).drawn == whole.drawn


def test_nor_where_generators_are_not_saved(tmp_path: Path) -> None:
    settings = {"seed": 5, "save_rng_state": False}
    first = _run(tmp_path, StopAt(batch=2), **settings)
    second = _run(tmp_path, **settings)
    assert len(first.drawn) == len(second.drawn) == 9
    assert not set(first.drawn) & set(second.drawn)


def test_seed_everything() -> None:
    def drawn(seed: int) -> list[float]:
        seed_everything(seed)
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    assert drawn(3) == drawn(3)
    assert not set(drawn(3)) & set(drawn(4))
    drawn(2**32 - 1)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True])
def test_bad_seed(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"seed: received {seed}; expected a whole number from 0 to"):
        GenericTrainerConfig(checkpoint_dir=str(tmp_path), seed=seed)


NEITHER = {"deterministic": False, "warn only": False, "filled": True, "benchmark": False}


@pytest.mark.parametrize(
    ("settings", "during"),
    [
        ({}, NEITHER),
        ({"deterministic": True}, {"deterministic": True, "warn only": True, "filled": False, "benchmark": False}),
        ({"benchmark": True}, {**NEITHER, "benchmark": True}),
    ],
    ids=["neither", "deterministic", "benchmark"],
)
def test_algorithms_while_it_trains(settings: dict[str, Any], during: dict[str, Any], tmp_path: Path) -> None:
    before = _torch_settings()
    assert before == NEITHER
    trainer = _run(tmp_path, **settings)
    assert trainer.settings == [during] * 6
    assert _torch_settings() == before
    # And a complete run that is looked at.
    _run(tmp_path, **settings)
    assert _torch_settings() == before


def test_restored_after_an_exception(tmp_path: Path) -> None:
    before = _torch_settings()
    with pytest.raises(ZeroDivisionError):
        _run(tmp_path, StopAt(batch=1, error=ZeroDivisionError()), deterministic=True)
    assert _torch_settings() == before


@pytest.mark.parametrize("warn_only", [False, True])
def test_what_the_program_chose_comes_back(warn_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        chosen = {"deterministic": True, "warn only": warn_only, "filled": True, "benchmark": True}
        with algorithms(deterministic=False, benchmark=False):
            assert _torch_settings() == chosen
        with algorithms(deterministic=True, benchmark=False):
            # What the fastest algorithm is may differ from run to run.
            assert _torch_settings()["benchmark"] is False
        assert _torch_settings() == chosen
    finally:
        torch.use_deterministic_algorithms(False)


def test_both_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with algorithms(deterministic=True, benchmark=True):
        assert _torch_settings()["benchmark"] is False
    assert "benchmark has no effect with deterministic" in caplog.text


def test_flags_that_a_process_has_locked_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once locked, they stay so: told to torch as if they were.
    monkeypatch.setattr(torch.backends, "flags_frozen", lambda: True)
    with algorithms(deterministic=True, benchmark=False):
        pass
