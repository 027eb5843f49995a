"""Lock files: what one process at a time may do in a folder."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_LOGGER = logging.getLogger(__name__)
# Of the files that this process holds.
_descriptors: set[int] = set()


def lock(descriptor: int) -> bool:
    """Lock an open file until the last copy of its descriptor is closed, in whatever way the processes end.

    Args:
        descriptor: Of the file.

    Returns:
        False if it is locked through another descriptor. True without a lock on Windows and on file systems without
        locks.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _LOGGER.debug("a file is not locked: %s", error)
    return True


@contextlib.contextmanager
def held(path: Path, refusal: Callable[[], Exception], *, seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file for this process alone; the system frees it when the process ends, in whatever way.

    Where the file cannot be made, as in a folder that may only be read, nothing is held.

    Args:
        path: Of the file, in a folder that exists; it is removed at the end.
        refusal: Makes the error for a file that another process holds.
        seconds: How long to wait for that process.

    Raises:
        Exception: From ``refusal``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, held(Path(folder) / ".lock", RuntimeError):
        ...     [path.name for path in Path(folder).iterdir()]
        ['.lock']
    """
    descriptor = None if sys.platform == "win32" else _taken(path, refusal, seconds)
    if descriptor is not None:
        _descriptors.add(descriptor)
    try:
        yield
    finally:
        # A process that was forked within the block may come here as well; it has nothing to give back.
        if descriptor in _descriptors:
            _descriptors.remove(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _taken(path: Path, refusal: Callable[[], Exception], seconds: float) -> int | None:
    """Descriptor of the locked file; None if there can be no file."""
    deadline, has_warned = time.monotonic() + seconds, False
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            _LOGGER.debug("%s is not held: %s", path, error)
            return None
        if lock(descriptor):
            if _is_at(path, descriptor):
                return descriptor
            # Its last holder removed it after it was opened here.
            os.close(descriptor)
            continue
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise refusal()
        if not has_warned:
            _LOGGER.warning("%s is held by another process, which is waited for: up to %g s", path, seconds)
            has_warned = True
        time.sleep(min(1.0, seconds))


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _close_all() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


if sys.platform != "win32":
    # A loader's worker outlives a trainer that was killed, and must not hold the folder against the next one.
    os.register_at_fork(after_in_child=_close_all)
