"""How far a grid search is: a bar on a terminal, lines in the log, and each cause of failures explained once."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from tqdm import tqdm

from trainers.searches.executors import Outcome

_LOGGER = logging.getLogger(__name__)
# Of many experiments so many are named.
_SHOWN_NAMES = 3
# Between two looks at what runs: for a bar, and for a line in the log.
_SECONDS_ON_TERMINAL, _SECONDS_IN_LOG = 1.0, 60.0


class SearchProgress:
    """Counts experiments while a search runs; messages are shown also where the program has set up no logging.

    On a terminal these are failures, above the bar; elsewhere, where there is no bar, successes as well.

    Args:
        total: How many experiments there are.

    Example:
        >>> with SearchProgress(total=0):
        ...     pass
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = self._failed = 0
        self._start = self._told = time.monotonic()
        # By cause: experiments that failed of it. The first were explained; those that came later are named at the end.
        self._causes: dict[str, list[str]] = {}
        self._repeated = set[str]()
        self._bar = tqdm(total=total, unit="experiment", disable=None)
        self._logger = logging.getLogger("trainers")
        self._level = self._logger.level
        self._handler = None if self._logger.hasHandlers() else _Lines()

    def __enter__(self) -> SearchProgress:
        if self._handler is not None:
            self._logger.addHandler(self._handler)
            self._logger.setLevel(logging.INFO if self._bar.disable else logging.WARNING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for cause in self._repeated:
            _LOGGER.error("%s failed of one cause: %s", _few(self._causes[cause]), cause)
        self._bar.close()
        if self._handler is not None:
            self._logger.removeHandler(self._handler)
            self._logger.setLevel(self._level)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Take in what became of experiments at the same time.

        Args:
            outcomes: Of the experiments.
        """
        if not outcomes:
            return
        failed: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            if outcome.error is not None:
                failed.setdefault(outcome.cause or outcome.error, []).append(outcome)
        self._done += len(outcomes)
        self._failed += sum(map(len, failed.values()))
        self._bar.update(len(outcomes))
        # The epoch that was told is of what has ended.
        self._bar.set_postfix_str(f"{self._failed} failed" if self._failed else "")
        complete = [outcome.job.name for outcome in outcomes if outcome.error is None]
        if complete:
            _LOGGER.info("%s: %s", self._so_far(), _say(complete, "complete"))
        for cause, own in failed.items():
            self._explain(cause, own)

    def tell(self, look: Callable[[], str | None]) -> None:
        """Say what the experiments that run are doing, now and then.

        Args:
            look: Returns it; None if it is not known. Not called more often than is told.
        """
        now = time.monotonic()
        if now - self._told < (_SECONDS_IN_LOG if self._bar.disable else _SECONDS_ON_TERMINAL):
            return
        self._told, what = now, look()
        if what is None:
            return
        self._bar.set_postfix_str(f"{self._failed} failed, {what}" if self._failed else what)
        if self._bar.disable:
            _LOGGER.info("%s: %s", self._so_far(), what)

    def _explain(self, cause: str, outcomes: Sequence[Outcome]) -> None:
        names, is_new = [outcome.job.name for outcome in outcomes], cause not in self._causes
        known = self._causes.setdefault(cause, [])
        if is_new:
            _LOGGER.error("%s: %s: %s", self._so_far(), _say(names, "failed"), outcomes[0].error)
        else:
            self._repeated.add(cause)
            _LOGGER.info("%s: %s like %s", self._so_far(), _say(names, "failed"), known[0])
        known += names

    def _so_far(self) -> str:
        parts = [f"{self._done} of {self._total}"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if 0 < self._done < self._total:
            left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
            parts.append(f"about {tqdm.format_interval(left)} left")
        return ", ".join(parts)


class _Lines(logging.Handler):
    """Lines on stderr, above a bar that is there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _say(names: Sequence[str], what: str) -> str:
    verb = "" if what == "failed" else "is " if len(names) == 1 else "are "
    return f"{_few(names)} {verb}{what}"


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    if len(names) <= _SHOWN_NAMES:
        return shown
    return f"{len(names)} experiments ({shown}, ...)"
