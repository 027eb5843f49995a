"""Checkpoints that are written in the background are those of the moment they were asked for, and fail loudly."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training_runs import assert_identical, final_state, run
from trainers.checkpoints import store
from trainers.checkpoints.files import read_checkpoint, write_checkpoint
from trainers.errors import PreemptionTimeoutError, TrainerError
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("epoch*.ckpt"))


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_the_files_are_the_same(kind: str, tmp_path: Path) -> None:
    runs = {
        way: run(tmp_path / way, kind, save_in_background=way == "behind", save_every_n_steps=1, save_top_k=-1)
        for way in ("at_once", "behind")
    }
    assert_identical(final_state(runs["behind"]), final_state(runs["at_once"]))
    assert _files(tmp_path / "behind") == _files(tmp_path / "at_once") != []
    for name in _files(tmp_path / "behind"):
        ours, theirs = (read_checkpoint(tmp_path / way / name) for way in ("behind", "at_once"))
        for key in ("model_state_dict", "optimizer_state_dict", "loader_state", "metrics", "epoch", "global_step"):
            assert_identical(ours[key], theirs[key])


class _Fixture:
    """A run of four steps whose saves wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: Any) -> None:
        self.let_go = threading.Event()
        self.writing = threading.Event()

        def slow(content: dict[str, Any], path: Path, *rest: Any) -> None:
            self.writing.set()
            assert self.let_go.wait(60)
            write_checkpoint(content, path, *rest)

        monkeypatch.setattr(store, "write_checkpoint", slow)
        self.seen: list[torch.Tensor] = []
        fixture = self

        class Trainer(GenericTrainer):
            def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
                fixture.seen.append(self.model.weight.detach().clone())
                if batch_idx == 1:
                    # The first save was begun and is not done, and training has gone on.
                    assert fixture.writing.wait(60)
                    assert _files(folder) == []
                    fixture.let_go.set()

        config = GenericTrainerConfig(
            checkpoint_dir=str(folder),
            max_epochs=1,
            save_every_n_steps=1,
            save_every_n_epochs=None,
            save_top_k=-1,
            save_in_background=True,
            **settings,
        )
        self.trainer = Trainer(config, loss_fn=nn.functional.mse_loss)

    def fit(self) -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.trainer.fit(model, optimizer, [(torch.ones(4, 2), torch.zeros(4, 1))] * 4)


def test_training_goes_on_and_the_file_is_of_the_moment_of_the_save(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fixture = _Fixture(monkeypatch, tmp_path)
    fixture.fit()
    assert len(_files(tmp_path)) == 4
    for name, weight in zip(_files(tmp_path), fixture.seen, strict=True):
        assert torch.equal(read_checkpoint(tmp_path / name)["model_state_dict"]["weight"], weight)


@pytest.mark.parametrize("failing", [2, 4])
def test_a_failure_is_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: int) -> None:
    fixture = _Fixture(monkeypatch, tmp_path)
    fixture.trainer.config.checkpoint.save_last = False
    slow, count = store.write_checkpoint, [0]

    def fails(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == failing:
            raise TrainerError("the disk is full")
        slow(*arguments)

    monkeypatch.setattr(store, "write_checkpoint", fails)
    with pytest.raises(TrainerError, match="the disk is full"):
        fixture.fit()
    assert len(_files(tmp_path)) == failing - 1
    # Raised at the next save, or at the end of the run.
    assert len(fixture.seen) == min(failing + 1, 4)


def test_a_signal_waits_for_the_save_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fixture = _Fixture(monkeypatch, tmp_path)
    fixture.let_go.set()
    trainer = fixture.trainer

    def on_batch_end(self: GenericTrainer, batch_idx: int, logs: dict[str, Any]) -> None:
        fixture.seen.append(self.model.weight.detach().clone())
        if batch_idx == 1:
            self.request_preemption()

    monkeypatch.setattr(type(trainer), "on_batch_end", on_batch_end)
    fixture.fit()
    assert trainer.preempted
    newest = read_checkpoint(tmp_path / "latest.ckpt")
    assert newest["global_step"] == 2
    assert torch.equal(newest["model_state_dict"]["weight"], fixture.seen[1])


def _trainer(folder: Path, at_the_second_step: Any, **settings: Any) -> GenericTrainer:
    """Saves in the background at the second step, and is asked to leave there."""

    class Saves(GenericTrainer):
        def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
            if batch_idx == 1:
                self.save_checkpoint()
                at_the_second_step()
                self.request_preemption()

    config = GenericTrainerConfig(checkpoint_dir=str(folder), max_epochs=1, save_in_background=True, **settings)
    return Saves(config, loss_fn=nn.functional.mse_loss)


def _fit(trainer: GenericTrainer) -> None:
    model = nn.Linear(2, 1)
    trainer.fit(model, torch.optim.SGD(model.parameters(), lr=0.1), [(torch.ones(4, 2), torch.zeros(4, 1))] * 4)


def test_no_requeue_before_the_file_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def requeue(job_id: str) -> bool:
        seen.append(_files(tmp_path))
        return True

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)
        write_checkpoint(*arguments)

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("trainers.preemption.requeueing.requeue", requeue)
    monkeypatch.setattr("trainers.preemption.requeueing.job_facts", lambda job_id, **named: {})
    monkeypatch.setattr(store, "write_checkpoint", slow)
    _fit(_trainer(tmp_path, lambda: None))
    assert seen == [["epoch_000_step_000002.ckpt"]]


def test_what_failed_is_saved_anew_when_the_run_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = iter([TrainerError("the disk is full")])

    def fails(*arguments: Any) -> None:
        for failure in outcomes:
            raise failure
        write_checkpoint(*arguments)

    monkeypatch.setattr(store, "write_checkpoint", fails)
    _fit(_trainer(tmp_path, lambda: None))
    assert _files(tmp_path) == ["epoch_000_step_000002.ckpt"]
    assert "the disk is full" in caplog.text


def test_a_running_save_is_waited_for_as_long_as_is_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    let_go = threading.Event()

    def stuck(*arguments: Any) -> None:
        assert let_go.wait(60)
        write_checkpoint(*arguments)

    monkeypatch.setattr(store, "write_checkpoint", stuck)
    before = threading.active_count()
    with pytest.raises(PreemptionTimeoutError, match=r"within 0\.2 s"):
        _fit(_trainer(tmp_path, lambda: None, preemption_timeout=0.2))
    assert _files(tmp_path) == []
    let_go.set()
    while threading.active_count() > before:
        time.sleep(0.01)
