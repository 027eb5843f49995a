"""A stretch of code that no handler of a signal breaks off.

Python runs the handlers of signals between two instructions of the main thread, and a handler may raise, as that of
Ctrl-C does. Between the call of a program that its arrays are donated to and the last array that takes their place,
such an exception would leave a batch without values.
"""

from __future__ import annotations

# What `signal` wraps. Its wrappers make enum members and take 20 times as long (5 us for a handler in CPython 3.11).
import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

# Windows has not all of them.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
_NUMBERS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))


class Uninterrupted:
    """Within the block handlers of signals wait; at its end they run, in the order in which the signals came.

    In threads other than the main one this does nothing, since no handler runs there. Handlers that are not Python's
    (also those by which the system ends a process) do not wait. Blocks may be nested.

    Example:
        >>> done = []
        >>> try:
        ...     with Uninterrupted():
        ...         signal.raise_signal(signal.SIGINT)
        ...         done.append("the rest of the block")
        ... except KeyboardInterrupt:
        ...     done.append("the interrupt")
        >>> done
        ['the rest of the block', 'the interrupt']
    """

    __slots__ = ("_handlers", "_received", "_waits")

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._received: list[tuple[int, FrameType | None]] = []
        self._waits = True

    def __enter__(self) -> None:
        """Take the place of the handlers."""
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for number in _NUMBERS:
                handler = _signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    _signal.signal(number, self._receive)
        except BaseException:
            # A handler whose turn was still to come.
            self._finish()
            raise

    def __exit__(self, *_: object) -> None:
        """Put the handlers back, then run those that have waited."""
        self._finish()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._waits:
            self._received.append((number, frame))
        else:
            self._handlers[number](number, frame)

    def _finish(self) -> None:
        """Put all handlers back and run all that have waited, even if some raise, also those back in place."""
        replaced, error = list(self._handlers.items()), None
        while replaced or self._received:
            try:
                while replaced:
                    _signal.signal(*replaced[-1])
                    replaced.pop()
                while self._received:
                    number, frame = self._received[0]
                    del self._received[0]
                    self._handlers[number](number, frame)
            except BaseException as raised:
                # Should yet another signal end this loop, what is still in place of a handler must not hold any back.
                self._waits = False
                raised.__context__ = raised.__context__ or error
                error = raised
        if error is not None:
            raise error
