"""Runs each experiment as a child process of this one."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigurationError
from trainers.config.files import write_atomically, written
from trainers.searches.executors import INTERRUPTED_EXIT_CODE, Job, MissingScript, Outcome, Plan, Task, read_record
from trainers.searches.nested import environment_for, refuse_own_script
from trainers.searches.packing import forget_outcomes, read_outcomes
from trainers.searches.progress import SearchProgress

_LOGGER = logging.getLogger(__name__)

POLL_SECONDS = 0.02
# How long children may take to save their state once they were asked to end.
GRACE_SECONDS = 30.0
SHOWN_CHARACTERS = 300
# Of a file of messages that is looked at, in bytes.
_TAIL = 4096
# As `trainers.reporting.results` says it.
_EPOCH = re.compile(rb"\bepoch (\d+): ")
_INTERRUPTED = "interrupted; a rerun goes on where it was"
# By whoever sends these a pack is ended, not by one of its experiments.
_ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class _Child:
    task: Task
    process: subprocess.Popen[bytes]
    # What is written about each of its experiments, but for their end.
    records: list[dict[str, Any]]
    start: float
    # How much earlier runs have left in the file of messages.
    old_messages: int


class LocalExecutor:
    """Runs ``python SCRIPT --config F --experiment-name N --output-dir D`` for each experiment, a few at a time.

    Experiments that a function builds run in packs, a process each. Output goes to ``local-<index>.out`` and ``.err``
    in the experiment's folder, that of a pack to ``local.out`` in the pack's, behind that of earlier runs. Where a pack
    dies, its experiments that had not ended are tried again in halves, so that only who kills its process fails. When
    this process is interrupted, asked to terminate or hung up on, its children are asked to end, and killed after a
    while; a second Ctrl-C kills them at once. What was not complete then is no success, and neither is a script that
    ends with exit code 75: it was interrupted, and `rerun_failed_only` runs it again.

    Example:
        >>> LocalExecutor().settled([Path("experiments/never-run")])
        set()
    """

    def check(self, plan: Plan) -> None:
        """Raise `MissingScript` if there is no script, `ConfigurationError` on Windows or for a script in itself."""
        if sys.platform == "win32":
            raise ConfigurationError(
                "execution_mode: received ExecutionMode.LOCAL on Windows, where child processes cannot be ended in "
                "order; expected Linux or macOS. Use ExecutionMode.DRY_RUN and run its commands."
            )
        if plan.build is None and not plan.script_path.is_file():
            raise MissingScript(
                f"script_path: received {plan.script_path}, which does not exist; expected the training script. "
                "Pass script_path=, or write the script. Nothing was started."
            )
        if plan.build is None:
            refuse_own_script(plan.script_path)

    def run(self, plan: Plan) -> Generator[Outcome]:
        """Run all experiments, at most ``max_concurrent_jobs`` (default 1) at once."""
        waiting, running = deque(plan.tasks()), list[_Child]()
        at_once = min(plan.max_concurrent_jobs or 1, len(waiting))
        with _caught_signals() as caught, SearchProgress(len(plan.jobs)) as progress:
            try:
                while waiting or running:
                    _raise_for(caught)
                    outcomes: list[Outcome] = []
                    while waiting and len(running) < at_once:
                        task = waiting.popleft()
                        try:
                            running.append(_start(task, plan, at_once))
                        except OSError as error:
                            outcomes += [Outcome(job, error=f"could not be started: {error}") for job in task.jobs]
                    ended = [child for child in running if child.process.poll() is not None]
                    for child in ended:
                        running.remove(child)
                        halves = _halves(child, plan)
                        waiting.extendleft(reversed(halves))
                        again = {job.index for half in halves for job in half.jobs}
                        outcomes += [outcome for outcome in _finish(child) if outcome.job.index not in again]
                    progress.add(outcomes)
                    progress.tell(lambda: next(filter(None, map(_epoch, running)), None))
                    yield from outcomes
                    if not ended and not outcomes:
                        time.sleep(POLL_SECONDS)
            finally:
                _stop(running, caught)

    def settled(self, folders: Collection[Path]) -> set[Path]:
        """Experiments that are complete; one at work holds the grid search's folder, so none is here."""
        return {folder for folder in folders if (read_record(folder) or {}).get("state") == "COMPLETED"}


def _start(task: Task, plan: Plan, at_once: int) -> _Child:
    # They share the machine's memory.
    command = [*task.command, "--packs-at-once", str(at_once)] if task.is_pack and at_once > 1 else task.command
    records = [
        {
            "executor": "local",
            "job_id": _job_id(job),
            "state": "RUNNING",
            "submitted": datetime.now().astimezone().isoformat(timespec="seconds"),
            "config_hash": job.config_hash(),
            "command": command,
        }
        for job in task.jobs
    ]
    for job, record in zip(task.jobs, records, strict=True):
        _write(job, record)
    if task.is_pack:
        forget_outcomes(task.folder)
    try:
        with _output(task, "out").open("ab") as out, _output(task, "err").open("ab") as err:
            # A session of its own: Ctrl-C on the terminal reaches this process only, which ends the child in order.
            old_messages = err.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=plan.project_root,
                env=None if task.is_pack else environment_for(plan.script_path),
                start_new_session=True,
                pass_fds=() if plan.lock is None else (plan.lock,),
            )
    except OSError:
        for job, record in zip(task.jobs, records, strict=True):
            _write(job, {**record, "state": "FAILED"})
        raise
    return _Child(task, process, records, time.monotonic(), old_messages)


def _epoch(child: _Child) -> str | None:
    """How far the experiments of a child are, where a trainer says so; a pack's all end at once."""
    with suppress(OSError), _output(child.task, "err").open("rb") as stream:
        stream.seek(max(child.old_messages, stream.seek(0, os.SEEK_END) - _TAIL))
        if epochs := _EPOCH.findall(stream.read()):
            return f"epoch {int(epochs[-1]) + 1} of {child.task.jobs[0].config.training.epochs}"
    return None


def _write(job: Job, record: dict[str, Any]) -> None:
    write_atomically(job.record_path, written(record, "json"))


def _halves(child: _Child, plan: Plan) -> list[Task]:
    """What had not ended in a pack that died, as two packs: at the end whoever kills its process is alone in it."""
    code, task = child.process.returncode, child.task
    left = [job for job in task.jobs if _outcomes(task).get(job.name, {}).get("state") == "INTERRUPTED"]
    if not code or -code in _ASKED_TO_END or len(left) < 2:
        return []
    halves = [plan.pack_task(half) for half in (left[: len(left) // 2], left[len(left) // 2 :])]
    try:
        for path, content in map(plan.pack_content, halves):
            write_atomically(path, written(content, "json"))
    except OSError as error:
        _LOGGER.warning("%s: experiments cannot be tried again: %s", task.folder, error)
        return []
    _LOGGER.warning(
        "a pack of %d experiments died: %s; output in %s. The %d that had not ended are tried again in halves.",
        len(task.jobs),
        _death(code),
        _output(task, "err"),
        len(left),
    )
    return halves


def _finish(child: _Child) -> list[Outcome]:
    faults = _faults(child)
    errors = {name: error for name, (error, _) in faults.items()}
    unwritten = _record_ends(child, {job.name: _state(errors.get(job.name)) for job in child.task.jobs})
    faults |= {name: (error, error) for name, error in unwritten.items()}
    return [
        Outcome(job, None, *faults[job.name]) if job.name in faults else Outcome(job, job_id=_job_id(job))
        for job in child.task.jobs
    ]


def _faults(child: _Child) -> dict[str, tuple[str, str]]:
    """What went wrong, by experiment: error and cause, see `Outcome`."""
    code, task = child.process.returncode, child.task
    place = f"; output in {_output(task, 'err')}"
    of_all: tuple[str, str] | None = None
    if code == INTERRUPTED_EXIT_CODE and not task.is_pack:
        of_all = (_INTERRUPTED, _INTERRUPTED)
    elif code:
        last = _last_line(_output(task, "err"))
        end = f"; last line: {last}" if last else ""
        of_all = (f"{_death(code)}{place}{end}", f"{_death(code)}{end}")
    elif task.is_pack:
        of_all = (_INTERRUPTED, _INTERRUPTED)
    faults = {} if of_all is None else {job.name: of_all for job in task.jobs}
    for name, own in _outcomes(task).items():
        if own["state"] == "COMPLETED":
            faults.pop(name, None)
        elif own["state"] == "FAILED":
            faults[name] = (f"{own['error']}{place}", own["error"])
    return faults


def _death(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)} (exit code {code})"


def _state(error: str | None) -> str:
    if error is None:
        return "COMPLETED"
    return "INTERRUPTED" if error == _INTERRUPTED else "FAILED"


def _record_ends(child: _Child, states: Mapping[str, str]) -> dict[str, str]:
    """Write what became of experiments; returns why that failed, of those that count as not complete therefore."""
    end = {"exit_code": child.process.returncode, "seconds": round(time.monotonic() - child.start, 3)}
    errors = {}
    for job, record in zip(child.task.jobs, child.records, strict=True):
        try:
            _write(job, {**record, "state": states[job.name], **end})
        except OSError as error:
            errors[job.name] = f"its end cannot be written: {error}"
    return errors


def _outcomes(task: Task) -> dict[str, dict[str, Any]]:
    """What a pack says about its experiments; of a script the exit code says it."""
    return read_outcomes(task.folder) if task.is_pack else {}


def _output(task: Task, suffix: str) -> Path:
    return task.folder / f"{task.output_name}.{suffix}"


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return ""  # a script may do with its folder what it likes
    return next((line.strip()[:SHOWN_CHARACTERS] for line in reversed(lines) if line.strip()), "")


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _stop(children: Sequence[_Child], caught: Sequence[int]) -> None:
    """Ask the children to end, and kill those that do not within the grace time or before the next signal."""
    before, deadline = len(caught), time.monotonic() + GRACE_SECONDS
    for child in children:
        if child.process.poll() is None:
            _send(child.process, signal.SIGTERM)
        else:
            _finish(child)
    children = [child for child in children if child.process.returncode is None]
    while any(child.process.poll() is None for child in children):
        if len(caught) > before or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    for child in children:
        if child.process.poll() is None:
            _send(child.process, signal.SIGKILL)
        child.process.wait()
        _record_ends(child, _states_of_stopped(child))


def _states_of_stopped(child: _Child) -> dict[str, str]:
    """What was complete before a pack was stopped stays so."""
    ended = {name for name, own in _outcomes(child.task).items() if own["state"] == "COMPLETED"}
    return {job.name: "COMPLETED" if job.name in ended else "CANCELLED" for job in child.task.jobs}


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a child and to what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process.

    A signal that raised at once could do so between the start of a child and its entry in the list of children.
    Handlers that others installed stay, and so does everything outside the main thread.
    """
    caught: list[int] = []
    former = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                former[number] = signal.signal(number, lambda received, frame: caught.append(received))
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _raise_for(caught: Sequence[int]) -> None:
    if caught:
        raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(128 + caught[0])


def _job_id(job: Job) -> str:
    return f"local-{job.index}"
