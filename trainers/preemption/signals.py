"""Signals and Slurm: a signal sets a flag, the trainer saves at the next boundary and asks Slurm to requeue the job."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

_LOGGER = logging.getLogger(__name__)
_SCONTROL_SECONDS = 30


class SignalFlags:
    """Which signals have come; the handlers do nothing but note them.

    Args:
        signals: To be noted.

    Attributes:
        received: Signal numbers in the order they came; 0 stands for a request of the program itself.
        interrupted: Whether Ctrl-C was pressed once.

    Example:
        >>> flags = SignalFlags([signal.SIGUSR1])
        >>> with_handlers = flags.install()
        >>> signal.raise_signal(signal.SIGUSR1)
        >>> flags.received == [signal.SIGUSR1]
        True
        >>> flags.restore()
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self._signals = list(signals)
        self._previous: dict[signal.Signals, Any] = {}
        self.received: list[int] = []
        self.interrupted = False

    def install(self, *, and_interrupt: bool = True) -> bool:
        """Install the handlers.

        Args:
            and_interrupt: Whether Ctrl-C is noted too; otherwise it interrupts at once.

        Returns:
            False outside the main thread, where Python allows none; a warning is logged then.
        """
        if threading.current_thread() is not threading.main_thread():
            _LOGGER.warning(
                "fit() runs outside the main thread, so no signal is handled: call request_preemption() to save and "
                "stop the run"
            )
            return False
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._note)
        # A handler of the user's own for Ctrl-C stays.
        if and_interrupt and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return True

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def clear(self) -> None:
        """Forget what has come."""
        self.received.clear()
        self.interrupted = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


def slurm_job_id() -> str | None:
    """Return the id under which Slurm requeues this job, ``A_k`` for an array task; None outside Slurm.

    Returns:
        The id.

    Example:
        >>> slurm_job_id() is None
        True
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID") or None


def job_facts(job_id: str, seconds: float = _SCONTROL_SECONDS) -> dict[str, str]:
    """Ask ``scontrol show job -o`` once.

    Args:
        job_id: Of the job.
        seconds: How long Slurm may take to answer.

    Returns:
        Its ``Key=Value`` pairs; empty if Slurm did not answer, which is logged.
    """
    answer = _scontrol("show", "job", "-o", job_id, seconds=seconds)
    return dict(pair.split("=", 1) for pair in (answer or "").split() if "=" in pair)


def is_being_preempted(facts: dict[str, str]) -> bool:
    """Whether a job that was sent SIGTERM is preempted rather than cancelled.

    Args:
        facts: From `job_facts`.

    Returns:
        True if Slurm still calls it running and has set a time of preemption. A job that its user cancels is
        COMPLETING or CANCELLED, and a requeue would revive it.

    Example:
        >>> is_being_preempted({"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00"})
        True
        >>> is_being_preempted({"JobState": "COMPLETING", "PreemptTime": "2026-01-01T00:00:00"})
        False
    """
    return facts.get("JobState") == "RUNNING" and _preempt_time_set(facts)


def is_at_its_time_limit(facts: dict[str, str]) -> bool:
    """Whether a running job was sent its signal by Slurm's ``--signal`` before the time limit, not by a preemption.

    Args:
        facts: From `job_facts`.

    Returns:
        True if Slurm calls it running and has set no time of preemption; False if Slurm did not answer.
    """
    return facts.get("JobState") == "RUNNING" and not _preempt_time_set(facts)


def _preempt_time_set(facts: dict[str, str]) -> bool:
    return facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown", "(null)", "")


def requeue(job_id: str) -> bool:
    """Ask Slurm to put this job back into the queue.

    Args:
        job_id: Of the job.

    Returns:
        Whether Slurm accepted; what went wrong is logged.
    """
    if _scontrol("requeue", job_id) is None:
        return False
    _LOGGER.info("job %s was requeued", job_id)
    return True


def _scontrol(*arguments: str, seconds: float = _SCONTROL_SECONDS) -> str | None:
    """Standard output of scontrol, or None with an error in the log."""
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _LOGGER.error("%s: %s", " ".join(command), error)
        return None
    if done.returncode:
        _LOGGER.error("%s: exit status %d: %s", " ".join(command), done.returncode, done.stderr.strip())
        return None
    return done.stdout
