"""Signals, requests and Slurm: saved once, requeued at most once, nothing trained in between."""

from __future__ import annotations

import datetime
import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training_runs import Recorder, assert_identical, final_state, make_loader, make_objects, run
from trainers import ranks
from trainers.callbacks import TrainingCallback
from trainers.checkpoints.files import read_checkpoint
from trainers.checkpoints.store import CheckpointStore
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.preemption.signals import is_at_its_time_limit, is_being_preempted
from trainers.settings import GenericTrainerConfig
from trainers.states import TrainerPhase

PREEMPTED = "JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00 EndTime=2026-01-02T00:00:00"
AT_THE_LIMIT = "JobId=7 JobState=RUNNING PreemptTime=None EndTime=2026-01-02T00:00:00"
CANCELLED = "JobId=7 JobState=COMPLETING PreemptTime=None"


class Signalled(Recorder):
    """Gets a real signal at its event."""

    number = signal.SIGUSR1

    def stop(self) -> None:
        signal.raise_signal(self.number)


class Terminated(Signalled):
    number = signal.SIGTERM


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster of one job: `scontrol` that notes its calls and answers with the given facts."""

    class Slurm:
        calls_file = tmp_path / "calls"

        def answer(self, facts: str, status: int = 0) -> None:
            script = tmp_path / "bin" / "scontrol"
            script.parent.mkdir(exist_ok=True)
            script.write_text(f'#!/bin/sh\necho "$*" >> {self.calls_file}\necho "{facts}"\nexit {status}\n')
            script.chmod(0o755)

        @property
        def calls(self) -> list[str]:
            return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

        @property
        def requeues(self) -> list[str]:
            return [call for call in self.calls if call.startswith("requeue")]

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    cluster = Slurm()
    cluster.answer(PREEMPTED)
    return cluster


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_saves_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    class Own(Signalled):
        pass

    Own.number = number
    notes: dict[str, Any] = {}
    # Whoever wants it may have a terminal that is closed save the run as well.
    settings = {"signals": ["SIGHUP"], "requeue_signals": []} if number is signal.SIGHUP else {}
    first = run(tmp_path, trainer_class=Own, stop_at=1, notes=notes, **settings)
    assert (first.preempted, first.requeued, first.global_step) == (True, False, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_000_step_000002.ckpt", "latest.ckpt"]
    assert len(run(tmp_path, notes=notes).notes["samples"]) == 12


def test_nothing_happens_between_signal_and_save(tmp_path: Path) -> None:
    class Watched(Recorder):
        def set_phase(self, phase: TrainerPhase) -> None:
            super().set_phase(phase)
            self.notes.setdefault("phases", []).append(phase)

        def on_preemption_signal(self, signum: int, frame: Any) -> None:
            self.notes["asked"] = len(self.notes["phases"])
            assert (signum, frame) == (0, None)

        def on_training_end(self, logs: dict[str, Any]) -> None:
            raise AssertionError

    for stop_at, phase in ((1, TrainerPhase.TRAIN_BATCH_END), (4, TrainerPhase.VAL_BATCH_END)):
        trainer = run(tmp_path / str(stop_at), trainer_class=Watched, stop_at=stop_at, scheduler_interval="step")
        later = trainer.notes["phases"][trainer.notes["asked"] :]
        assert later == [TrainerPhase.CHECKPOINT_SAVE_START, TrainerPhase.CHECKPOINT_SAVE_END, phase]


def test_a_save_in_the_hook_is_not_repeated(tmp_path: Path) -> None:
    class Saves(Recorder):
        saves = 0

        def save_checkpoint(self, emergency: bool = False) -> Path:
            self.saves += 1
            return super().save_checkpoint(emergency)

        def on_preemption_signal(self, signum: int, frame: Any) -> None:
            self.save_checkpoint(emergency=True)

    assert run(tmp_path, trainer_class=Saves, stop_at=1).saves == 1


def test_no_checkpoint_where_none_is_wanted(tmp_path: Path) -> None:
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=2)
    config.preemption.checkpoint_on_preemption = False
    trainer = Recorder(config, {}, 1)
    model, optimizer, _ = make_objects("single")
    trainer.fit(model, optimizer, make_loader("list"))
    assert trainer.preempted
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_installed_in_every_fit_and_put_back(tmp_path: Path) -> None:
    def own(number: int, frame: Any) -> None:
        raise AssertionError

    before = {number: signal.signal(number, own) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    try:
        config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=2)
        notes: dict[str, Any] = {}
        trainer = Signalled(config, notes, 1)
        for expected_step in (2, 5):
            model, optimizer, scheduler = make_objects("single")
            trainer.fit(model, optimizer, make_loader("list"), None, scheduler)
            assert (trainer.preempted, trainer.global_step) == (True, expected_step)
            assert all(signal.getsignal(number) is own for number in before)
            trainer.stop_at = 4
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_in_a_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainers: list[Recorder] = []
    thread = threading.Thread(target=lambda: trainers.append(run(tmp_path, stop_at=2)))
    thread.start()
    thread.join()
    assert trainers[0].preempted
    assert "outside the main thread" in caplog.text


@pytest.mark.parametrize("presses", [1, 2])
def test_keyboard_interrupt(presses: int, tmp_path: Path) -> None:
    class Interrupted(Recorder):
        def stop(self) -> None:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            self.notes["went_on"] = True

    whole = final_state(run(tmp_path / "whole"))
    notes: dict[str, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", trainer_class=Interrupted, stop_at=1, notes=notes)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert ("went_on" in notes) == (presses == 1)
    assert (tmp_path / "stopped" / "latest.ckpt").exists() == (presses == 1)
    resumed = final_state(run(tmp_path / "stopped"))
    assert_identical({**resumed, "notes": None}, {**whole, "notes": None})


@pytest.mark.parametrize(
    ("environment", "job"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "5_2")],
)
def test_requeued_exactly_once(
    environment: dict[str, str], job: str, slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = run(tmp_path / "run", trainer_class=Signalled, stop_at=1)
    assert slurm.requeues == [f"requeue {job}"]
    assert (trainer.preempted, trainer.requeued, trainer.preemption_count) == (True, True, 1)
    assert read_checkpoint(tmp_path / "run" / "latest.ckpt")["preemption_count"] == 1


@pytest.mark.parametrize(
    ("facts", "requeued"), [(PREEMPTED, True), (CANCELLED, False), (AT_THE_LIMIT, False), ("", False)]
)
def test_sigterm_asks_slurm_after_the_save(facts: str, requeued: bool, slurm: Any, tmp_path: Path) -> None:
    slurm.answer(facts)
    trainer = run(tmp_path / "run", trainer_class=Terminated, stop_at=1)
    assert slurm.calls == ["show job -o 7", *(["requeue 7"] if requeued else [])]
    assert (trainer.preempted, trainer.requeued) == (True, requeued)
    assert read_checkpoint(tmp_path / "run" / "latest.ckpt")["preemption_count"] == int(requeued)


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        ({"requeue_job": False}, {}),
        ({"requeue_signals": ["SIGUSR2"]}, {}),
        ({}, {"SLURM_JOB_ID": ""}),
        ({}, {"SLURM_PROCID": "1"}),
    ],
)
def test_not_requeued(
    settings: dict[str, Any],
    environment: dict[str, str],
    slurm: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = run(tmp_path / "run", trainer_class=Signalled, stop_at=1, **settings)
    assert (trainer.preempted, trainer.requeued, slurm.requeues) == (True, False, [])


@pytest.mark.parametrize("exits", [True, False])
def test_requeued_at_most_max_preemptions_times(
    exits: bool, slurm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes: dict[str, Any] = {}
    outcomes = []
    for stop_at in (1, 3, 6):
        config = GenericTrainerConfig(checkpoint_dir=str(tmp_path / "run"), max_epochs=3, max_preemptions=2)
        config.preemption.exit_on_max_preemptions = exits
        trainer = Signalled(config, notes, stop_at)
        model, optimizer, scheduler = make_objects("single")
        trainer.fit(model, optimizer, make_loader("list"), None, scheduler)
        outcomes.append((trainer.preempted, trainer.requeued, trainer.preemption_count))
    assert outcomes == [(True, True, 1), (True, True, 2), (exits, False, 2)]
    assert len(slurm.requeues) == 2
    assert trainer.global_step == (7 if exits else 12)
    assert "max_preemptions" in caplog.text


def test_time_limits_do_not_count_where_the_run_advances(slurm: Any, tmp_path: Path) -> None:
    slurm.answer(AT_THE_LIMIT)
    notes: dict[str, Any] = {}
    for stop_at in (1, 3, 6):
        trainer = run(tmp_path / "run", trainer_class=Signalled, notes=notes, stop_at=stop_at, max_preemptions=1)
        assert (trainer.requeued, trainer.preemption_count) == (True, 0)


def test_a_slow_slurm_is_not_waited_for_before_the_save(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers after the save, which is put right before the requeue."""
    monkeypatch.setattr("trainers.preemption.requeueing._SECONDS_BEFORE_THE_SAVE", 0.2)
    saved, at_requeue = tmp_path / "run" / "latest.ckpt", tmp_path / "at_requeue.ckpt"
    script = tmp_path / "bin" / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$*" >> {slurm.calls_file}\n[ "$1" = requeue ] || [ -e {saved} ] || exec sleep 60\n'
        f'[ "$1" = requeue ] && cp {saved} {at_requeue}\necho "{AT_THE_LIMIT}"\n'
    )
    trainer = run(tmp_path / "run", trainer_class=Signalled, stop_at=1)
    assert slurm.calls == ["show job -o 7", "show job -o 7", "requeue 7"]
    assert (trainer.preempted, trainer.requeued, trainer.preemption_count) == (True, True, 0)
    # Slurm may end the job as soon as it is requeued.
    assert [read_checkpoint(path)["preemption_count"] for path in (at_requeue, saved)] == [0, 0]


@pytest.mark.parametrize("is_requeued", [True, False])
def test_a_run_that_was_saved_is_requeued_where_its_count_cannot_be_corrected(
    is_requeued: bool, slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Slurm answers only after the first save, or refuses the requeue; the disk is full then."""
    monkeypatch.setattr("trainers.preemption.requeueing._SECONDS_BEFORE_THE_SAVE", 0.2)
    saved = tmp_path / "run" / "latest.ckpt"
    (tmp_path / "bin" / "scontrol").write_text(
        f'#!/bin/sh\necho "$*" >> {slurm.calls_file}\n[ -e {saved} ] || exec sleep 60\n'
        f'echo "{AT_THE_LIMIT if is_requeued else PREEMPTED}"\n[ "$1" = show ] || exit {int(not is_requeued)}\n'
    )
    store_save, counts = CheckpointStore.save, []

    def save(store: CheckpointStore, name: str, content: dict[str, Any], **options: Any) -> Path:
        counts.append(content["preemption_count"])
        if len(counts) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return store_save(store, name, content, **options)

    monkeypatch.setattr(CheckpointStore, "save", save)
    trainer = run(tmp_path / "run", trainer_class=Signalled, stop_at=1)
    assert slurm.requeues == ["requeue 7"]
    assert (trainer.preempted, trainer.requeued, counts) == (True, is_requeued, [1, 0])
    assert "preemption_count could not be corrected" in caplog.text
    assert read_checkpoint(saved)["preemption_count"] == 1


@pytest.mark.parametrize("missing", [True, False])
def test_failing_scontrol_is_logged(
    missing: bool, slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if missing:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        slurm.answer("slurm_load_jobs error", status=1)
    trainer = run(tmp_path / "run", trainer_class=Signalled, stop_at=1)
    assert (trainer.preempted, trainer.requeued) == (True, False)
    assert "scontrol requeue 7" in caplog.text
    assert read_checkpoint(tmp_path / "run" / "latest.ckpt")["preemption_count"] == 0


def test_signal_in_the_last_epoch_does_not_complete_the_run(tmp_path: Path) -> None:
    trainer = run(tmp_path, trainer_class=Signalled, stop_at=17)
    assert trainer.current_phase is TrainerPhase.VAL_BATCH_END
    assert read_checkpoint(tmp_path / "latest.ckpt")["resume_state"]["phase"] == "VAL_BATCH_END"


def test_a_signal_after_the_last_validation_batch_changes_nothing(tmp_path: Path) -> None:
    class AtTheEnd(Recorder):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            if epoch == 2:
                self.request_preemption()

    trainer = run(tmp_path, trainer_class=AtTheEnd)
    assert (trainer.preempted, trainer.current_phase) == (False, TrainerPhase.TRAINING_COMPLETE)
    assert (trainer.late_signals, trainer.exit_code) == ([0], 0)


@pytest.mark.parametrize("at", ["on_epoch_end", "on_training_end", "complete"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_end_of_fit_is_passed_on(number: signal.Signals, at: str, tmp_path: Path) -> None:
    """After the last boundary, or where a complete run is only loaded."""

    class Late(TrainingCallback):
        def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, Any]) -> None:
            if at == "on_epoch_end" and epoch == 1:
                signal.raise_signal(number)

        def on_training_end(self, trainer: Any, logs: dict[str, Any]) -> None:
            if at == "on_training_end":
                signal.raise_signal(number)

        def load_state_dict(self, state: Any) -> None:
            signal.raise_signal(number)

        def state_dict(self) -> dict[str, Any]:
            return {}

    def fit() -> GenericTrainer:
        model, optimizer, _ = make_objects("single")
        trainer.fit(model, optimizer, make_loader("list"))
        return trainer

    trainer = GenericTrainer(
        GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=2), loss_fn=nn.functional.mse_loss
    )
    trainer.add_callback(Late())
    if at == "complete":
        fit()
        assert trainer.late_signals == []
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt, match="came to its end"):
            fit()
    else:
        assert fit().late_signals == [signal.SIGTERM]
    assert (trainer.preempted, trainer.exit_code) == (False, 0)
    assert read_checkpoint(tmp_path / "latest.ckpt")["resume_state"]["phase"] == "TRAINING_COMPLETE"
    if at != "complete":
        trainer.callbacks.clear()
        assert fit().late_signals == []


def test_the_exit_code_tells_an_interrupted_run_from_a_complete_one(tmp_path: Path) -> None:
    assert run(tmp_path, trainer_class=Signalled, stop_at=1).exit_code == 75
    assert run(tmp_path).exit_code == 0


def test_what_slurm_says() -> None:
    assert is_being_preempted({"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00"})
    assert not is_being_preempted({"JobState": "RUNNING", "PreemptTime": "None"})
    assert is_at_its_time_limit({"JobState": "RUNNING"})
    assert not is_at_its_time_limit({})


def test_ranks_agree_and_keep_their_own_state(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    whole = torch.load(tmp_path / "whole_0.pt")
    assert whole["weights"].equal(torch.load(tmp_path / "whole_1.pt")["weights"])
    for rank in range(2):
        done = torch.load(tmp_path / f"resumed_{rank}.pt")
        expected = torch.load(tmp_path / f"whole_{rank}.pt")
        assert done["noise"].equal(expected["noise"])
        assert done["weights"].equal(expected["weights"])
    assert not torch.load(tmp_path / "whole_0.pt")["noise"].equal(torch.load(tmp_path / "whole_1.pt")["noise"])


def _rank(rank: int, folder: str) -> None:
    """One of two processes; only the first one is asked to stop."""
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    loader = make_loader("list")

    class Noisy(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            result = super().training_step(batch, batch_idx)
            self.notes["noise"] = torch.rand(2)
            return result

        def _event(self) -> None:
            if rank == 0:
                super()._event()

    def train(name: str, stop_at: int | None, notes: dict[str, Any]) -> Recorder:
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
        torch.manual_seed(rank)
        config = GenericTrainerConfig(checkpoint_dir=f"{folder}/{name}", max_epochs=2)
        trainer = Noisy(config, notes, stop_at)
        trainer.fit(model, torch.optim.Adam(model.parameters()), loader)
        return trainer

    def note(name: str, trainer: Recorder) -> None:
        weights = trainer.model.module.weight.detach()
        torch.save({"weights": weights, "noise": trainer.notes["noise"]}, f"{folder}/{name}_{rank}.pt")

    note("whole", train("whole", None, {}))
    notes: dict[str, Any] = {}
    assert train("stopped", 2, notes).preempted
    note("resumed", train("stopped", None, notes))
    distributed.destroy_process_group()


def test_unconnected_tasks_are_runs_of_their_own(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    folder = tmp_path / "run"
    trainer = run(folder, trainer_class=Signalled, stop_at=1)
    assert trainer.preempted
    assert trainer.save_checkpoint().is_file()
    assert "this is task 1 of a Slurm job, and its processes are not connected: it trains and saves" in caplog.text
    # The job is requeued as a whole, by its first task.
    assert slurm.requeues == []
    caplog.clear()
    monkeypatch.setattr("mb_torch.backend._rank", 1)
    run(tmp_path / "connected", max_epochs=1)
    assert list((tmp_path / "connected").glob("*.ckpt")) == []
    assert "not connected" not in caplog.text


@pytest.mark.long
def test_ranks_decide_and_fail_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_deciding_rank, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["epochs"] == second["epochs"] == {"patience": 1, "plateau": 2, "hook": 1, "step": 0}
    assert first["rates"] == second["rates"] == [0.1, 0.1, 0.05]
    assert first["error"] == "TrainerError: disk full"
    assert second["error"].startswith("OtherRankFailed: rank 0 failed, so this one stops as well")
    assert first["error"] in second["error"]


class Deciding(GenericTrainer):
    """On the first rank the losses of validations rise, on the second they fall; the second may ask to stop."""

    asked_at: tuple[int, int] | None = None
    rates: list[float]

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": 10.0 + (self.current_epoch if ranks.rank() == 0 else -self.current_epoch)}

    def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
        self._ask((self.current_epoch, batch_idx))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self._ask((epoch, -1))

    def _ask(self, place: tuple[int, int]) -> None:
        if ranks.rank() == 1 and place == self.asked_at:
            self.stop_training = True


def _deciding_rank(number: int, folder: str) -> None:
    """One of two processes."""
    from torch import distributed

    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    timeout = datetime.timedelta(seconds=30)
    distributed.init_process_group("gloo", rank=number, world_size=2, init_method=place, timeout=timeout)

    def trainer(name: str, **settings: Any) -> Deciding:
        made = Deciding(
            GenericTrainerConfig(checkpoint_dir=f"{folder}/{name}", max_epochs=3, **settings),
            loss_fn=nn.functional.mse_loss,
        )
        made.rates = []
        return made

    def fit(made: Deciding) -> int:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        loader = make_loader("list")
        made.fit(model, optimizer, loader, loader[:1], scheduler)
        return made.current_epoch

    by_hook, by_step, plateau = trainer("hook"), trainer("step"), trainer("plateau")
    by_hook.asked_at, by_step.asked_at = (1, -1), (0, 1)
    epochs = {
        "patience": fit(trainer("patience", early_stopping_patience=1)),
        "plateau": fit(plateau),
        "hook": fit(by_hook),
        "step": fit(by_step),
    }
    failing = trainer("save")
    if number == 0:

        def fail(*given: Any, **named: Any) -> None:
            raise TrainerError("disk full")

        failing.store.save = fail  # type: ignore[method-assign]
    with pytest.raises(TrainerError) as caught:
        fit(failing)
    error = f"{type(caught.value).__name__}: {caught.value}"
    Path(folder, f"{number}.json").write_text(json.dumps({"epochs": epochs, "rates": plateau.rates, "error": error}))
    distributed.destroy_process_group()
