"""Training runs that are stopped at random moments and started again, each time in a process of its own.

`main` is the program of a process that imports what the runs need, once, and forks for every start of a run. It starts
neither threads nor JAX itself, since a process that has either cannot be forked.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from tests.training_runs import BATCH, EPOCHS, ROWS, Rows, make_objects, run_state
from trainers.checkpoints.files import read_checkpoint
from trainers.config.schema import LoggingConfig
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig
from trainers.states import ResumeState, TrainerPhase

# What a run differs in, but for the model and the number of loader processes.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"save_every_n_steps": 3},
    "accumulating": {
        "gradient_accumulation_steps": 3,
        "scheduler_interval": "step",
        "save_every_n_steps": 1,
        "save_top_k": 2,
        "monitor": "val_loss",
        "early_stopping_patience": 2,
    },
}
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGTERM")
# Where, and what happens there. "time" is anywhere, by the clock; the others count what happens in a run.
STOPS = [
    ("time", "signal"),
    ("time", "SIGKILL"),
    ("training", "signal"),
    ("training", "SIGKILL"),
    ("training", "exception"),
    ("validation", "signal"),
    ("validation", "SIGKILL"),
    ("validation", "exception"),
    ("last epoch", "signal"),
    ("last epoch", "SIGKILL"),
    ("hook", "exception"),
    ("save", "signal"),
    ("save", "SIGKILL"),
    ("save", "exception"),
]
DONE, LEFT, RAISED, FAILED = 0, 75, 76, 77
_LONGEST_RUN = 120


@dataclass
class Stop:
    """How a run is stopped: by ``action`` at the ``count``-th event in ``place``, or after a share of a run's time."""

    place: str
    action: str
    count: int = 0
    share: float = 0.0
    to_group: bool = False


class Stopped(Exception):
    """What a user's code raises."""


class Numbered(Rows):
    """Rows whose targets say which row it is."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().__getitem__(index)
        return inputs, torch.cat([targets, torch.tensor([float(index)])])


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets[..., :1])


def numbers_in(batch: Any) -> list[int]:
    return [int(number) for number in batch[1][:, 1]]


class Events:
    """Counts what happens in a run, and stops it at one of these."""

    def __init__(self, stop: Stop | None) -> None:
        self.counts: Counter[str] = Counter()
        self._stop = stop

    def at(self, place: str, epoch: int | None = None) -> None:
        places = [place, *(["last epoch"] if epoch == EPOCHS - 1 else [])]
        self.counts.update(places)
        stop = self._stop
        if stop is not None and stop.place in places and self.counts[stop.place] == stop.count:
            _act(stop)


def _act(stop: Stop) -> None:
    if stop.action == "exception":
        raise Stopped(stop.place)
    if stop.to_group:
        # Another process sends it, as a scheduler would. The shell is one of those that get it.
        subprocess.run(["sh", "-c", f"kill -s {stop.action[3:]} -- -{os.getpgrp()}"], check=False)
    else:
        os.kill(os.getpid(), signal.Signals[stop.action])


class Watched(GenericTrainer):
    """Says what happens, and writes down the samples and metrics with the place in the run that they belong to."""

    def __init__(self, config: GenericTrainerConfig, events: Events, notes: Path, started: Callable[[], None]) -> None:
        self._events = events
        self._notes = notes
        self._started = started
        self._numbers: list[int] = []
        super().__init__(config, loss_fn=loss_fn)

    def _make_loop(self, train_loader: Any, val_loader: Any) -> Any:
        loop = super()._make_loop(train_loader, val_loader)
        train_batch = loop.training.train_batch

        def noted(batch: Any, batch_idx: int) -> Any:
            self._numbers = numbers_in(batch)
            return train_batch(batch, batch_idx)

        loop.training.train_batch = noted
        return loop

    def set_phase(self, phase: TrainerPhase) -> None:
        super().set_phase(phase)
        kind = {"TRAIN": "training", "VAL": "validation"}.get(phase.value.split("_", maxsplit=1)[0], "between")
        self._events.at(kind, self.current_epoch)

    def call_hooks(self, name: str, *arguments: Any) -> None:
        self._events.at("hook", self.current_epoch)
        super().call_hooks(name, *arguments)
        self._events.at("hook", self.current_epoch)

    def on_training_start(self) -> None:
        self._started()

    def on_resume_from_checkpoint(self, state: ResumeState) -> None:
        place = [state.epoch + 1, 0, 0]
        if state.phase is TrainerPhase.TRAIN_START_EPOCH:
            place = [state.epoch, 0, 0]
        elif state.val is not None:
            place = [state.epoch, 1, state.val.batch_idx]
        elif state.train is not None:
            place = [state.epoch, 0, state.train.batch_idx]
        self._note(place, "resumed", None)

    def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
        loss = torch.as_tensor(logs["loss"]).tolist()
        self._note([self.current_epoch, 0, batch_idx], "trained", [self._numbers, self.global_step, loss])

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        logs = super().validation_step(batch, batch_idx)
        self._note([self.current_epoch, 1, batch_idx], "validated", [numbers_in(batch), logs["loss"].tolist()])
        return logs

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        self._note([epoch, 2, 0], "epoch", logs)

    def _note(self, place: list[int], what: str, values: Any) -> None:
        with self._notes.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([place, what, values]) + "\n")


def sequence(notes: Path) -> list[Any]:
    """What counted, in its order: where a run went on from, later notes are of work that was lost and done again."""
    counted: list[Any] = []
    begins_anew = False
    for line in notes.read_text(encoding="utf-8").splitlines():
        place, what, values = json.loads(line)
        if what == "started":
            begins_anew = True
            continue
        if what == "resumed":
            counted = [note for note in counted if note[0] < place]
        else:
            counted = [*([] if begins_anew else counted), [place, what, values]]
        begins_anew = False
    return counted


def _loaders(variant: str, workers: int) -> tuple[Any, Any]:
    if variant == "plain":
        train = DataLoader(Numbered(), BATCH, shuffle=True, num_workers=workers)
    else:
        weights = torch.arange(1.0, ROWS + 1)
        train = DataLoader(Numbered(), BATCH, sampler=WeightedRandomSampler(weights, ROWS), num_workers=workers)
    return train, DataLoader(torch.utils.data.Subset(Numbered(), range(6)), BATCH, num_workers=workers)


def _watch_saves(events: Events) -> None:
    """Make every step of a save an event, also the middle of a file."""
    save = torch.save

    def save_in_parts(value: Any, stream: Any) -> None:
        whole = BytesIO()
        save(value, whole)
        data = whole.getvalue()
        stream.write(data[: len(data) // 2])
        stream.flush()
        events.at("save")
        stream.write(data[len(data) // 2 :])

    torch.save = save_in_parts
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "symlink_to")):
        setattr(owner, name, _watched(getattr(owner, name), events))


def _watched(function: Callable[..., Any], events: Events) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        events.at("save")
        return function(*arguments, **keywords)

    return call


def start(folder: Path, case: tuple[str, int, str], stop: Stop | None, started: Callable[[], None]) -> int:
    """Begin a run, or go on with it, until it is done or stopped; what a program does that is started again."""
    kind, workers, variant = case
    folder.mkdir(exist_ok=True)
    model, optimizer, scheduler = make_objects(kind)
    notes, events = folder / "notes", Events(stop)
    with notes.open("a", encoding="utf-8") as stream:
        stream.write('[null, "started", null]\n')
    config = GenericTrainerConfig(
        checkpoint_dir=str(folder / "checkpoints"),
        max_epochs=EPOCHS,
        log_every_n_steps=1,
        logging=LoggingConfig(console_log=False, csv_log_dir=str(folder / "csv")),
        **VARIANTS[variant],
    )
    trainer = Watched(config, events, notes, started)
    saved = torch.save
    _watch_saves(events)
    try:
        trainer.fit(model, optimizer, *_loaders(variant, workers), scheduler)
    except Stopped:
        return RAISED
    torch.save = saved
    if trainer.preempted:
        return LEFT
    torch.save(end_of(trainer, folder), folder / "end.pt")
    (folder / "counts.json").write_text(json.dumps(events.counts))
    return DONE


def end_of(trainer: GenericTrainer, folder: Path) -> dict[str, Any]:
    """Everything that must not depend on whether a run was stopped."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "latest.ckpt")
    kept = ("epoch", "global_step", "metrics", "early_stopping", "best", "preemption_count", "trackers")
    return {
        **run_state(trainer),
        "checkpoint": {name: checkpoint[name] for name in kept},
        # A process that was killed before its first checkpoint has left metrics.1.csv: the next began anew.
        "csv": {
            str(path.relative_to(folder)): path.read_text() for path in sorted((folder / "csv").rglob("metrics.csv"))
        },
    }


def plan(generator: random.Random, first: tuple[str, str], counts: dict[str, int], workers: int) -> list[Stop]:
    """The stops of one run: the given one, and up to three more at random."""
    stops = []
    for place, what in [first, *generator.choices(STOPS, k=generator.choice([0, 0, 1, 3]))]:
        action = generator.choice(SIGNALS) if what == "signal" else what
        share, to_group = generator.random(), bool(workers) and generator.random() < 0.5
        # Later stops are to be met in what is left of a run.
        count = generator.randint(1, max(1, counts.get(place, 0) // (3 if stops else 1)))
        stops.append(Stop(place, action, count, share, to_group))
    return stops


def _forked(folder: Path, case: tuple[str, int, str], stop: Stop | None, seconds: float) -> int:
    """Start a run in a child process, and stop it from outside if that is wanted; returns its exit status."""
    ready, says_ready = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            os.setsid()
            # Nothing may hang.
            signal.alarm(_LONGEST_RUN)
            status = start(folder, case, stop, lambda: os.close(says_ready))
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    os.close(says_ready)
    os.read(ready, 1)
    os.close(ready)
    if stop is not None and stop.place == "time":
        time.sleep(seconds * stop.share)
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            number = signal.Signals[stop.action]
            os.killpg(child, number) if stop.to_group else os.kill(child, number)
    _, status = os.waitpid(child, 0)
    # Loader processes of one that was killed go as well, by and by.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def _explained(stop: Stop) -> set[int]:
    """Exit statuses that a stop may lead to."""
    if stop.action == "exception":
        return {RAISED}
    number = signal.Signals[stop.action]
    if stop.action == "SIGKILL":
        return {-number}
    # By the clock it may come before the handlers are there, or after they are gone.
    return {LEFT, -number} if stop.place == "time" else {LEFT}


def stopped_run(folder: Path, case: tuple[str, int, str], stops: list[Stop], seconds: float) -> list[dict[str, Any]]:
    """Start a run again and again until it is done; returns the stops after which it was started again."""
    took_place: list[dict[str, Any]] = []
    left = list(stops)
    while True:
        stop = left.pop(0) if left else None
        status = _forked(folder, case, stop, seconds)
        if status == DONE and stop is not None and not took_place:
            # By the clock it may come too late, and a signal after the last boundary changes nothing.
            can_be_earlier = stop.share > 0.01 if stop.place == "time" else stop.action in SIGNALS and stop.count > 1
            if not can_be_earlier:
                raise AssertionError(f"the run was not stopped by {stop}")
            shutil.rmtree(folder)
            left.insert(0, replace(stop, count=stop.count // 2, share=stop.share / 2))
            continue
        if status == DONE:
            return took_place
        if stop is None or status not in _explained(stop):
            raise AssertionError(f"exit status {status} after {stop}, after {took_place}")
        took_place.append(asdict(stop))


def main(folder: Path, case: tuple[str, int, str], seed: int, kinds: list[tuple[str, str]]) -> None:
    """Do one run that is never stopped, and for each kind of stop one that is.

    Args:
        folder: Gets a folder for each run, and what happened as ``report.json``.
        case: Kind of model, number of loader processes, variant.
        seed: Of all stops.
        kinds: Of the first stop of each run.
    """
    torch.set_num_threads(1)
    # Much is imported at the first use only, which would be that of every child.
    if case[0] == "xla":
        importlib.import_module("mb_jax.engine")
    make_objects("batch" if case[0] == "xla" else case[0])
    assert threading.active_count() == 1
    generator = random.Random(seed)
    # Twice: only the second one takes as long as those that follow.
    for name in ("first", "whole"):
        begin = time.monotonic()
        status = _forked(folder / name, case, None, 0.0)
        seconds = time.monotonic() - begin
        assert status == DONE, f"exit status {status} of a run that was not stopped"
    counts = json.loads((folder / "whole" / "counts.json").read_text())
    report = []
    for number, kind in enumerate(kinds):
        stops = plan(generator, kind, counts, case[1])
        entry: dict[str, Any] = {"planned": [asdict(stop) for stop in stops], "error": None, "stops": []}
        report.append(entry)
        try:
            entry["stops"] = stopped_run(folder / str(number), case, stops, seconds)
        except AssertionError as error:
            details = folder / str(number) / "error"
            entry["error"] = f"{error}\n{details.read_text() if details.exists() else ''}"
        (folder / "report.json").write_text(json.dumps(report))
