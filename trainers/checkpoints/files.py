"""Single checkpoint files: plain data, written whole or not at all, checked to the last byte before use.

A file holds tensors on the CPU, numbers, strings, lists and dicts, so ``torch.load`` opens it with
``weights_only=True``; nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import numbers
import os
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from trainers.errors import (
    CheckpointTimeoutError,
    DamagedCheckpointError,
    MissingCheckpointError,
    PreemptionTimeoutError,
    TrainerError,
)
from trainers.states import RESUME_VERSION, ResumeState

FORMAT_VERSION = 1
# What tells the newest checkpoint, and which version of this library goes on from it.
_IN_ANY_VERSION = {"format_version", "global_step", "save_timestamp", "metrics", "resume_state"}
_PLACE = {"version", "phase", "epoch", "train", "val"}
# What a run needs to go on.
_NEEDED = _IN_ANY_VERSION | {
    "experiment_name",
    "epoch",
    "model_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "scaler_state_dict",
    "loader_state",
    "other_ranks",
    "best",
    "early_stopping",
    "preemption_count",
    "callbacks",
    "trackers",
    "config",
    "environment",
}
_USE_ANOTHER = "Use another file; load_checkpoint() without a path takes the newest of the run that can be used."


def to_plain(value: Any, where: str) -> Any:
    """Return a value as tensors on the CPU, numbers, strings, lists, tuples and dicts.

    Args:
        value: Anything made of these; tensors that are on the CPU already are not copied.
        where: What it is, for the error.

    Raises:
        TrainerError: Something in it is of another type.

    Example:
        >>> from collections import OrderedDict
        >>> to_plain(OrderedDict(a=(1, None)), "state")
        {'a': (1, None)}
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {to_plain(key, where): to_plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        plain = [to_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
        return tuple(plain) if isinstance(value, tuple) else plain
    raise TrainerError(
        f"{where} cannot be saved",
        received=f"a {type(value).__name__}",
        expected="tensors, numbers, strings, lists and dicts",
        fix="Leave it out of the state_dict(), or turn it into these.",
    )


def with_types_of(loaded: Any, current: Any) -> Any:
    """Give the dicts of a loaded scheduler state the types they have in the scheduler itself.

    Args:
        loaded: From a checkpoint.
        current: The state that the object has now.

    Returns:
        The loaded values; a ``Counter`` where there is one now.
    """
    if isinstance(current, Counter):
        return Counter(loaded)
    if isinstance(loaded, dict) and isinstance(current, Mapping):
        return {key: with_types_of(entry, current.get(key)) for key, entry in loaded.items()}
    return loaded


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint after checking every byte of it against the checksums in the file.

    Args:
        path: Of the file.

    Returns:
        Its content, tensors on the CPU.

    Raises:
        MissingCheckpointError: There is no such file.
        DamagedCheckpointError: It is truncated or altered, or holds something that would have to be executed.
        TrainerError: It is of another format version, or may be whole but cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except FileNotFoundError as error:
        raise MissingCheckpointError(f"{path} does not exist") from error
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, MemoryError) as error:
        raise _unusable(path, error) from error
    if bad is not None:
        raise DamagedCheckpointError(f"{path} is damaged in {bad!r}", fix=_USE_ANOTHER)
    content = read_header(path, map_file=False)
    for what, version, own in (
        ("format", content["format_version"], FORMAT_VERSION),
        ("resume state", content["resume_state"]["version"], RESUME_VERSION),
    ):
        if version != own:
            raise TrainerError(
                f"{path}",
                received=f"{what} version {version}",
                expected=f"{what} version {own}",
                fix="Continue the run with the version of this library that wrote it.",
            )
    return content


def read_header(path: Path, *, map_file: bool = True) -> dict[str, Any]:
    """Read a checkpoint without looking at every byte.

    Args:
        path: Of the file.
        map_file: Whether tensors are read only when they are used.

    Returns:
        Its content.

    Raises:
        MissingCheckpointError: There is no such file.
        DamagedCheckpointError: It is truncated, or something else, or lacks what a run needs to go on.
        TrainerError: It may be whole but cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=map_file)
    except Exception as error:  # torch.load has no one error for a damaged file
        raise _unusable(path, error) from error
    _check_kind(path, content)
    return content


def _check_kind(path: Path, content: Any) -> None:
    """Refuse what is no checkpoint, or half of one; those of other versions have other keys."""
    problem = f"{path} is no checkpoint of a run"
    if not isinstance(content, dict):
        raise DamagedCheckpointError(problem, received=f"a {type(content).__name__}", fix=_USE_ANOTHER)
    needed = _NEEDED if content.get("format_version", FORMAT_VERSION) == FORMAT_VERSION else _IN_ANY_VERSION
    missing = sorted(needed - content.keys())
    if missing:
        raise DamagedCheckpointError(problem, received=f"a dict without {missing}", fix=_USE_ANOTHER)
    for key in ("metrics", "resume_state"):
        if not isinstance(content[key], dict):
            received = f"a {type(content[key]).__name__} as {key!r}"
            raise DamagedCheckpointError(problem, received=received, expected="a dict", fix=_USE_ANOTHER)
    missing = sorted(_PLACE - content["resume_state"].keys())
    if missing:
        raise DamagedCheckpointError(problem, received=f"a resume_state without {missing}", fix=_USE_ANOTHER)
    if content["resume_state"]["version"] == RESUME_VERSION:
        try:
            ResumeState.from_dict(content["resume_state"])
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{path}: {error.problem}", fix=_USE_ANOTHER) from error


def _unusable(path: Path, error: BaseException) -> TrainerError:
    """Tell a damaged file, in whose place an older one is used, from one that cannot be read for now."""
    # A process that trains in the same folder may have removed it while it was read.
    if isinstance(error, FileNotFoundError) or not path.exists():
        return MissingCheckpointError(f"{path} does not exist")
    # A broken archive makes zipfile read at impossible places.
    of_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
    if of_system or isinstance(error, MemoryError) or "allocate memory" in str(error):
        return TrainerError(
            f"{path} cannot be read: {error}",
            fix="It may be whole, so nothing is trained in its place: make it readable and start the same command "
            "again, or rename it if it is lost.",
        )
    if not path.stat().st_size:
        what = "is empty"
    elif not zipfile.is_zipfile(path):
        what = "is truncated, or no checkpoint"
    else:
        # Further lines of torch's message advise to open files without its safety.
        cause = str(error).strip().split("\n", 1)[0].split(". ", 1)[0]
        what = f"is damaged, or holds more than tensors and plain data: {cause}"
    return DamagedCheckpointError(f"{path} {what}", fix=_USE_ANOTHER)


def write_checkpoint(
    content: dict[str, Any], path: Path, deadline: float, timeout_error: Callable[[], TrainerError]
) -> None:
    """Write a checkpoint in a thread, so that a file system that hangs cannot hold the trainer beyond the deadline.

    Args:
        content: Plain data, see `to_plain`.
        path: Of the file; one that exists is replaced when the new one is complete.
        deadline: On `time.monotonic`'s clock.
        timeout_error: Makes the error for a save that is not done by then.

    Raises:
        TrainerError: From ``timeout_error``, or because the disk is full or cannot be written to; no file has changed.
    """
    decision = threading.Lock()
    is_committed = is_abandoned = False
    failures: list[BaseException] = []
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")

    def work() -> None:
        nonlocal is_committed
        try:
            with temporary.open("xb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            with decision:
                if is_abandoned or time.monotonic() > deadline:
                    raise timeout_error()
                temporary.replace(path)
                is_committed = True
            flush_folder(path.parent)
        except BaseException as error:
            failures.append(error)
        finally:
            # A disk that can no longer be written to refuses this as well; the next start tidies up.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    thread = threading.Thread(target=work, name="checkpoint", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        with decision:
            # Either the file is in its place by now, or it never will be.
            is_abandoned = not is_committed
        if is_abandoned:
            raise timeout_error()
        thread.join()
    for failure in failures:
        if isinstance(failure, (OSError, RuntimeError)) and not isinstance(failure, TrainerError):
            raise _not_written(path, failure) from failure
        raise failure


def _not_written(path: Path, failure: BaseException) -> TrainerError:
    # Of a write that fails torch tells only that the archive is incomplete; the reason is what that followed.
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return TrainerError(
        f"the checkpoint {path} was not written: {failure if cause is None else cause}",
        fix="The earlier checkpoints are as they were: make room or make the folder writable, then start the same "
        "command again.",
    )


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash of the machine.

    Args:
        folder: That was changed.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoint_timeout(seconds: float) -> TrainerError:
    """Return the error of an ordinary save that took too long.

    Args:
        seconds: That were allowed.

    Returns:
        The error.
    """
    return CheckpointTimeoutError(
        f"the checkpoint was not written within {seconds:g} s",
        fix="Nothing half-written is visible. Raise checkpoint.timeout_seconds, or write to a faster disk.",
    )


def preemption_timeout(seconds: float) -> TrainerError:
    """Return the error of a save on preemption that took too long.

    Args:
        seconds: That were allowed.

    Returns:
        The error.
    """
    return PreemptionTimeoutError(
        f"the checkpoint on preemption was not written within {seconds:g} s",
        fix="Nothing half-written is visible. Raise preemption.timeout_minutes, or write to a faster disk.",
    )
