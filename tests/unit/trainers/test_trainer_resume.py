"""A run that was stopped anywhere ends bit-identical to one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from mb_torch import MissingPackage
from tests.training_runs import (
    EPOCHS,
    LOADERS,
    ROWS,
    OwnLoader,
    Recorder,
    Rows,
    assert_identical,
    final_state,
    make_loader,
    make_objects,
    run,
)
from trainers.errors import MissingCheckpointError, TrainerError
from trainers.generic import GenericTrainer
from trainers.loaders.resumable import make_resumable
from trainers.settings import GenericTrainerConfig
from trainers.states import ResumeState, TrainerPhase, capture_rng_state

REPOSITORY = Path(__file__).parents[3]
# Four training and two validation batches an epoch.
EVENTS = EPOCHS * (4 + 2)


def _stopped_and_resumed(folder: Path, stop_at: int, kind: str, **options: Any) -> Recorder:
    notes: dict[str, Any] = {}
    first = run(folder, kind, stop_at=stop_at, notes=notes, **options)
    assert first.preempted
    assert first.current_phase is not TrainerPhase.TRAINING_COMPLETE
    second = run(folder, kind, notes=notes, **options)
    assert not second.preempted
    return second


# After the first batch, the last one of an epoch, in its validation, and in a later epoch.
SOME_EVENTS = [0, 3, 4, 8]


@pytest.mark.parametrize(
    ("kind", "events"),
    [
        ("single", SOME_EVENTS),
        ("batch", SOME_EVENTS),
        *(pytest.param(kind, range(EVENTS), marks=pytest.mark.long) for kind in ("single", "batch", "xla")),
    ],
    ids=lambda value: value if isinstance(value, str) else "all" if len(value) == EVENTS else "some",
)
def test_stopped_after_any_batch(kind: str, events: Sequence[int], tmp_path: Path) -> None:
    whole = final_state(run(tmp_path / "whole", kind))
    assert whole["steps"] == 4 * EPOCHS
    for event in events:
        resumed = _stopped_and_resumed(tmp_path / str(event), event, kind)
        assert_identical(final_state(resumed), whole, f"stopped at event {event}: ")


@pytest.mark.parametrize("loader", LOADERS)
def test_every_kind_of_loader(loader: str, tmp_path: Path) -> None:
    whole = final_state(run(tmp_path / "whole", loader=loader))
    for event in (2, 3, 4, 7):
        resumed = _stopped_and_resumed(tmp_path / str(event), event, "single", loader=loader)
        assert_identical(final_state(resumed), whole, f"stopped at event {event}: ")


@pytest.mark.long
@pytest.mark.parametrize(
    ("loader", "event"), [("shuffled", 1), ("generator", 7), ("weighted", 3), ("stream", 1), ("stateful", 8)]
)
def test_loaders_with_workers(loader: str, event: int, tmp_path: Path) -> None:
    whole = final_state(run(tmp_path / "whole", loader=loader, workers=2, max_epochs=2))
    resumed = _stopped_and_resumed(tmp_path / "stopped", event, "single", loader=loader, workers=2, max_epochs=2)
    assert_identical(final_state(resumed), whole)


@pytest.mark.long
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["single", "batch"])
def test_stopped_after_any_batch_with_workers(loader: str, kind: str, tmp_path: Path) -> None:
    whole = final_state(run(tmp_path / "whole", kind, loader=loader, workers=2, max_epochs=2))
    for event in range(12):
        resumed = _stopped_and_resumed(tmp_path / str(event), event, kind, loader=loader, workers=2, max_epochs=2)
        assert_identical(final_state(resumed), whole, f"stopped at event {event}: ")


@pytest.mark.parametrize("kind", ["single", pytest.param("batch", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 3},
        {"scheduler_interval": "step"},
        {"validate_every_n_epochs": 2},
        {"early_stopping_patience": 1, "save_every_n_steps": 2, "monitor": "val_loss"},
        {"max_steps": 7},
        {"max_steps": 8},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_with_settings(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    whole = final_state(run(tmp_path / "whole", kind, **settings))
    for event in (2, 5, 8):
        notes: dict[str, Any] = {}
        run(tmp_path / str(event), kind, stop_at=event, notes=notes, **settings)
        resumed = run(tmp_path / str(event), kind, notes=notes, **settings)
        assert_identical(final_state(resumed), whole, f"stopped at event {event}: ")


def test_stopped_again_and_again(tmp_path: Path) -> None:
    class EveryBatch(Recorder):
        def _event(self) -> None:
            self.request_preemption()

    whole = final_state(run(tmp_path / "whole"))
    notes: dict[str, Any] = {}
    for _ in range(EVENTS):
        assert run(tmp_path / "stopped", notes=notes, trainer_class=EveryBatch).preempted
    assert_identical(final_state(run(tmp_path / "stopped", notes=notes, trainer_class=EveryBatch)), whole)


def test_stopped_before_the_first_batch_of_an_epoch(tmp_path: Path) -> None:
    class AtEpochStart(Recorder):
        def on_epoch_start(self, epoch: int) -> None:
            torch.rand(3)
            if epoch == 1 and self.stop_at is not None:
                self.request_preemption()

    whole = final_state(run(tmp_path / "whole", trainer_class=AtEpochStart))
    notes: dict[str, Any] = {}
    first = run(tmp_path / "stopped", notes=notes, stop_at=-1, trainer_class=AtEpochStart)
    assert first.current_phase is TrainerPhase.TRAIN_START_EPOCH
    assert len(notes["samples"]) == 4
    assert_identical(final_state(run(tmp_path / "stopped", notes=notes, trainer_class=AtEpochStart)), whole)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("batch", 4),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [("single", 1), ("single", 6), ("batch", 7)]),
    ],
)
def test_killed_without_warning(kind: str, step: int, tmp_path: Path) -> None:
    whole = final_state(run(tmp_path / "whole", kind, save_every_n_steps=1))
    command = [sys.executable, "-m", "tests.training_runs", str(tmp_path / "killed"), kind, str(step)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = run(tmp_path / "killed", kind, save_every_n_steps=1)
    rest = [sample for sample in whole["notes"]["samples"] if 4 * sample[0] + sample[1] >= step]
    logs = [entry for entry in whole["notes"]["logs"] if entry[0] >= step // 4]
    assert_identical(final_state(resumed), {**whole, "notes": {"samples": rest, "logs": logs}})


def test_exception_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    class Fails(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            if self.current_epoch == 1 and batch_idx == 2 and self.stop_at is not None:
                raise ZeroDivisionError("of the user")
            return super().training_step(batch, batch_idx)

    whole = final_state(run(tmp_path / "whole", trainer_class=Fails))
    with pytest.raises(ZeroDivisionError, match="of the user"):
        run(tmp_path / "failed", trainer_class=Fails, stop_at=-1)
    assert [path.name for path in sorted((tmp_path / "failed").glob("epoch*"))] == ["epoch_000_step_000004.ckpt"]
    resumed = final_state(run(tmp_path / "failed", trainer_class=Fails))
    for name in ("model", "optimizer", "schedulers", "rng", "logs"):
        assert_identical(resumed[name], whole[name], name)


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_complete_run_returns_at_once_with_its_weights(kind: str, tmp_path: Path) -> None:
    whole = run(tmp_path, kind)
    again = run(tmp_path, kind)
    assert again.notes == {"samples": [], "logs": []}
    assert again.current_phase is TrainerPhase.TRAINING_COMPLETE
    assert again.global_step == whole.global_step
    assert again.logs == whole.logs
    assert again.model_metrics == whole.model_metrics
    assert bool(again.model_metrics) is (kind == "batch")
    assert_identical(again.model.state_dict(), dict(whole.model.state_dict()))


@pytest.mark.parametrize("loader", ["shuffled", "list"])
@pytest.mark.parametrize("bound", [{"max_epochs": 1}, {"max_steps": 6}, {"max_steps": 8}])
def test_raised_bounds_go_on(bound: dict[str, int], loader: str, tmp_path: Path) -> None:
    whole = final_state(run(tmp_path / "whole", loader=loader))
    notes: dict[str, Any] = {}
    assert not run(tmp_path / "short", notes=notes, loader=loader, **bound).preempted
    resumed = final_state(run(tmp_path / "short", notes=notes, loader=loader))
    assert_identical(resumed, whole)


@pytest.mark.parametrize("low", [{"max_epochs": 1}, {"max_epochs": 2}, {"max_steps": 5}], ids=str)
def test_lowered_bounds_lose_nothing(low: dict[str, int], tmp_path: Path) -> None:
    """A run that was stopped within an epoch goes on from there once they are raised again."""
    whole = final_state(run(tmp_path / "whole"))
    for event in (7, 10, 11):
        notes: dict[str, Any] = {}
        run(tmp_path / str(event), notes=notes, stop_at=event)
        for settings in (low, low, {}):
            trainer = run(tmp_path / str(event), notes=notes, **settings)
        assert_identical(final_state(trainer), whole, f"stopped at event {event}: ")


@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize("patience", [3, None])
def test_raised_patience_goes_on(
    kind: str, patience: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Worse(Recorder):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            loss = super().validation_step(batch, batch_idx)["loss"]
            return {"loss": loss.detach() * 0 + self.current_epoch}

    def fit(name: str, patience: int | None, notes: dict[str, Any]) -> Recorder:
        settings = {"early_stopping_patience": patience, "max_epochs": 6}
        return run(tmp_path / name, kind, notes=notes, trainer_class=Worse, **settings)

    whole = fit("whole", patience, {})
    assert whole.global_step == (24 if patience is None else 16)
    notes: dict[str, Any] = {}
    assert fit("stopped", 2, notes).global_step == 12
    assert fit("stopped", 2, notes).global_step == 12
    assert fit("stopped", 1, notes).global_step == 12
    assert_identical(final_state(fit("stopped", patience, notes)), final_state(whole))
    assert ("models [0, 1, 2] are trained again" in caplog.text) == (kind == "batch")


def test_a_raised_patience_changes_nothing_where_a_hook_ended_the_run(tmp_path: Path) -> None:
    class Ended(Recorder):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"loss": torch.tensor([1.0, -1.0, -1.0]) * self.current_epoch}

        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            self.stop_training = epoch == 1

    def fit(patience: int) -> Recorder:
        return run(tmp_path, "batch", trainer_class=Ended, early_stopping_patience=patience, max_epochs=6)

    first = fit(1)
    # One of the models had stopped, but that is not what ended the run.
    assert (list(first.stopped_models), first.global_step) == ([0], 8)
    assert fit(3).global_step == 8


def test_auto_resume_off_starts_again(tmp_path: Path) -> None:
    whole = final_state(run(tmp_path))
    again = run(tmp_path, auto_resume=False)
    assert_identical(final_state(again), whole)
    assert len(again.notes["samples"]) == 4 * EPOCHS


def test_load_checkpoint_before_fit(tmp_path: Path) -> None:
    whole = final_state(run(tmp_path, save_top_k=-1))
    model, optimizer, scheduler = make_objects("single")
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path / "other"), max_epochs=EPOCHS)
    trainer = Recorder(config, {})
    state = trainer.load_checkpoint(tmp_path / "epoch_000_step_000004.ckpt")
    assert (state.phase, state.epoch, state.global_step) == (TrainerPhase.EPOCH_END, 0, 4)
    seen: list[ResumeState] = []
    trainer.on_resume_from_checkpoint = seen.append  # type: ignore[method-assign]
    trainer.fit(model, optimizer, make_loader("shuffled"), make_loader("list")[:2], scheduler)
    assert [state.global_step for state in seen] == [4]
    assert_identical(trainer.model.state_dict(), whole["model"])
    trainer.load_checkpoint(tmp_path / "epoch_000_step_000004.ckpt")
    with pytest.raises(AssertionError):
        assert_identical(trainer.model.state_dict(), whole["model"])


def test_an_earlier_state_is_gone_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, monitor="val_loss")

    class GoesBack(Recorder):
        def fit(self, *arguments: Any) -> None:
            self.load_checkpoint(tmp_path / "epoch_000_step_000004.ckpt")
            super().fit(*arguments)

    assert run(tmp_path, trainer_class=GoesBack, stop_at=1, monitor="val_loss").global_step == 6
    assert "['epoch_001_step_000008.ckpt', 'epoch_002_step_000012.ckpt'], which are given up" in caplog.text
    state = GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path))).load_checkpoint()
    assert state.global_step == 6
    aside = "epoch_002_step_000012.ckpt.set_aside"
    assert GenericTrainer(GenericTrainerConfig()).load_checkpoint(tmp_path / aside).global_step == 12
    assert all(path.exists() for path in tmp_path.iterdir())


def test_a_run_that_begins_anew_is_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, auto_resume=False, stop_at=1)
    assert GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path))).load_checkpoint().global_step == 2


def test_load_checkpoint_without_any(tmp_path: Path) -> None:
    trainer = GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path)))
    with pytest.raises(MissingCheckpointError) as caught:
        trainer.load_checkpoint()
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        trainer.load_checkpoint(tmp_path / "nothing.ckpt")


def test_resume_state_is_plain_and_versioned() -> None:
    state = ResumeState(TrainerPhase.EPOCH_END, 1, 2)
    assert ResumeState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    with pytest.raises(TrainerError, match=r"'v1.0'.*'v2.0'"):
        ResumeState.from_dict({**state.to_dict(), "version": "v1.0"})


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [("shuffled", "list", "kind 'stateful'"), ("list", "iterable", "kind 'list'")],
)
def test_another_kind_of_loader_is_refused(before: str, after: str, message: str, tmp_path: Path) -> None:
    run(tmp_path, loader=before, stop_at=1)
    with pytest.raises(TrainerError, match=message):
        run(tmp_path, loader=after)


def test_another_number_of_workers_is_refused_within_an_epoch(tmp_path: Path) -> None:
    run(tmp_path / "inside", stop_at=1)
    with pytest.raises(TrainerError, match="num_workers=2; expected num_workers=0"):
        run(tmp_path / "inside", workers=2)
    run(tmp_path / "between", max_epochs=1)
    assert run(tmp_path / "between", max_epochs=2, workers=2).global_step == 8


@pytest.mark.parametrize(
    ("loader_class", "changed", "message"),
    [
        (DataLoader, {"batch_size": 8}, "received batch_size=8; expected batch_size=4, as in the run"),
        (OwnLoader, {"batch_size": 8}, "received batch_size=8; expected batch_size=4, as in the run"),
        (DataLoader, {"drop_last": True}, "received drop_last=True; expected drop_last=False"),
        (DataLoader, {"dataset": Rows(28)}, "received samples=28; expected samples=14"),
        (DataLoader, {"dataset": Rows(28), "batch_size": 7}, "batch_size=7, samples=28"),
    ],
)
def test_other_batches_are_refused_within_an_epoch(
    loader_class: type[DataLoader], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def fit(folder: Path, epochs: int, stop_at: int | None, **options: Any) -> Recorder:
        model, optimizer, _ = make_objects("single")
        config = GenericTrainerConfig(checkpoint_dir=str(folder), max_epochs=epochs)
        trainer = Recorder(config, {}, stop_at)
        trainer.fit(model, optimizer, loader_class(**{"dataset": Rows(), "batch_size": 4, "shuffle": True, **options}))
        return trainer

    fit(tmp_path / "inside", 2, 1)
    with pytest.raises(TrainerError, match=message):
        fit(tmp_path / "inside", 2, None, **changed)
    fit(tmp_path / "between", 1, None)
    assert fit(tmp_path / "between", 2, None, **changed).current_epoch == 1


def test_checkpoints_that_do_not_say_what_batches_were_of() -> None:
    def resumable() -> Any:
        return make_resumable(DataLoader(Rows(), 4), "train_loader")

    before = resumable()
    batches = before.start()
    next(batches)
    state = before.state_dict()
    del state["batches_of"]
    assert len(list(resumable().resume(state, None, 1))) == 3


@pytest.mark.parametrize("loader_class", [DataLoader, OwnLoader])
def test_samplers_are_told_the_epoch(loader_class: type[DataLoader], tmp_path: Path) -> None:
    class Drawn(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            self.notes.setdefault("drawn", []).extend(batch.tolist())
            return {"loss": (self.model.weight**2).mean()}

    def fit(folder: Path, stop_at: int | None, notes: dict[str, Any]) -> list[int]:
        model = torch.nn.Linear(1, 1)
        sampler = DistributedSampler(range(ROWS), num_replicas=1, rank=0, seed=3)
        trainer = Drawn(GenericTrainerConfig(checkpoint_dir=str(folder), max_epochs=3), notes, stop_at)
        trainer.fit(model, torch.optim.SGD(model.parameters()), loader_class(range(ROWS), 4, sampler=sampler))
        return notes["drawn"]

    whole = fit(tmp_path / "whole", None, {})
    epochs = {tuple(whole[start : start + ROWS]) for start in range(0, 3 * ROWS, ROWS)}
    assert len(epochs) == 3
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(ROWS))}
    for stop_at in (1, 3, 5, 9):
        notes: dict[str, Any] = {}
        fit(tmp_path / str(stop_at), stop_at, notes)
        assert fit(tmp_path / str(stop_at), None, notes) == whole


def test_one_shot_iterator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="list_iterator.*can be iterated again"):
        make_resumable(iter([1]), "train_loader")


def test_without_torchdata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(MissingPackage, match=r"modelbatch-hybrid\[train\]"):
        make_resumable(make_loader("shuffled"), "train_loader")
    assert len(make_resumable([1, 2], "train_loader")) == 2


def test_a_request_before_a_resumed_validation_runs_no_batch(tmp_path: Path) -> None:
    class AtOnce(Recorder):
        def on_training_start(self) -> None:
            if self.global_step:
                self.request_preemption()

    whole = final_state(run(tmp_path / "whole"))
    notes: dict[str, Any] = {}
    for _ in range(2):
        assert run(tmp_path / "stopped", trainer_class=AtOnce, stop_at=4, notes=notes).preempted
        assert notes["events"] == 5
    assert_identical(final_state(run(tmp_path / "stopped", notes=notes)), whole)


def test_generators_are_captured_at_saves_and_starts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted() -> Any:
        calls.append(1)
        return capture_rng_state()

    monkeypatch.setattr("trainers.loop.capture_rng_state", counted)
    run(tmp_path)
    # Each epoch: the start of training, the start of validation, one save.
    assert len(calls) == 3 * EPOCHS
