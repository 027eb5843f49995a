"""The checkpoints of a run: which file is the newest and which the best, and how many are kept."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from trainers.checkpoints.files import (
    checkpoint_timeout,
    flush_folder,
    read_checkpoint,
    read_header,
    write_checkpoint,
)
from trainers.errors import DamagedCheckpointError, MissingCheckpointError, TrainerError
from trainers.folder_lock import held

DEFAULT_FILENAME = "epoch_{epoch:03d}_step_{step:06d}.ckpt"
LATEST, BEST = "latest.ckpt", "best.ckpt"
LOCK_FILE = ".fit.lock"
SET_ASIDE = ".set_aside"
DAMAGED = ".damaged"
# How long a process waits for the folder: servers of files hold that of a machine that died for a minute or two.
LOCK_SECONDS = 120.0
_LOGGER = logging.getLogger(__name__)
# Phases that a run is saved in, in their order within an epoch.
_FINISHED = [
    "TRAIN_START_EPOCH",
    "TRAIN_BATCH_END",
    "VAL_START_EPOCH",
    "VAL_BATCH_END",
    "EPOCH_END",
    "TRAINING_COMPLETE",
]
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


@dataclass
class CheckpointFile:
    """A checkpoint on disk.

    Attributes:
        name: Of the file, in the checkpoint folder.
        step: Optimizer steps done.
        place: How far the run was, to be compared; not the time, since clocks jump.
        value: Of the monitored metric; None for saves within an epoch.
        is_own: Whether it was saved under this name; a copy that somebody made is theirs to delete.
    """

    name: str
    step: int
    place: tuple[int, ...]
    value: float | None
    is_own: bool = True


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie.
        filename: Pattern of their names; may use ``epoch``, ``step`` and any key of the logs.
        keep: How many to keep, -1 for all. The newest and the best are never deleted.
        monitor: Metric that says which are best; None for none.
        mode: ``"min"`` or ``"max"``.

    Attributes:
        files: What there is, oldest first.
        damaged: Names of files that cannot be used; they are left where they are until their names are needed.
        best: ``{"metric", "value", "file"}``; None before the first monitored value.

    Raises:
        TrainerError: The pattern can name no file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        filename: str = DEFAULT_FILENAME,
        keep: int = 5,
        monitor: str | None = None,
        mode: str = "min",
    ) -> None:
        check_filename(filename)
        self.folder = folder
        self.files: list[CheckpointFile] = []
        self.damaged: list[str] = []
        self.best: dict[str, Any] | None = None
        self._filename = filename
        self._keep = keep
        self._monitor = monitor
        self._mode = mode
        self._makes_links = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, made if it is missing, for this process: one at a time saves there.

        What killed saves have left is removed, and the files there are are looked through.

        Raises:
            TrainerError: There is no such folder and none can be made, or another process holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainerError(
                f"checkpoint_dir: the folder {self.folder} cannot be made ({error})", fix="Choose another one."
            ) from error
        with held(self.folder / LOCK_FILE, self._refusal, seconds=LOCK_SECONDS):
            for path in sorted(self.folder.iterdir()):
                if _TEMPORARY.fullmatch(path.name):
                    # Who only looks at a finished run may have no right to.
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
            self.look()
            yield

    def check_writable(self) -> None:
        """Refuse a folder in which no file can be made.

        Raises:
            TrainerError: It may only be read, or is full.
        """
        probe = self.folder / f".probe.{uuid4().hex}.tmp"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise TrainerError(
                f"checkpoint_dir: the folder {self.folder} cannot be written to ({error})", fix="Choose another one."
            ) from error

    def look(self) -> None:
        """Look through the files there are; a damaged one is left where it is, with a warning.

        Raises:
            TrainerError: A file cannot be read, for a reason that says nothing about its content.
        """
        self.files, self.damaged = [], []
        for path in sorted(self.folder.glob("*.ckpt")):
            if path.is_file() and not path.is_symlink():
                try:
                    content = read_header(path)
                except DamagedCheckpointError as error:
                    _LOGGER.warning("%s: the file is skipped, and the newest good one is used", error.problem)
                    self.damaged.append(path.name)
                    continue
                except MissingCheckpointError:
                    continue  # another process trains here, and keeps only so many
                self.files.append(
                    CheckpointFile(
                        path.name,
                        content["global_step"],
                        _place_in(content["resume_state"]),
                        self._value_in(content),
                        is_own=content.get("file", path.name) == path.name,
                    )
                )
        self.files.sort(key=lambda file: (file.step, file.place))

    def newest(self) -> dict[str, Any]:
        """Read the newest file that is undamaged.

        Raises:
            MissingCheckpointError: There is none.
        """
        for file in list(reversed(self.files)):
            try:
                return read_checkpoint(self.folder / file.name)
            # Another process may train here, and keep only so many.
            except (DamagedCheckpointError, MissingCheckpointError) as error:
                _LOGGER.warning("%s: an older checkpoint is used", error.problem)
                if isinstance(error, DamagedCheckpointError):
                    self.damaged.append(file.name)
                self.files.remove(file)
        raise MissingCheckpointError(
            "no checkpoint to load",
            received=f"the folder {self.folder}"
            + (f" with the damaged {sorted(self.damaged)}" if self.damaged else ""),
            expected="a .ckpt file that can be read",
            fix="Give load_checkpoint() a path, or train first.",
        )

    def name_for(self, epoch: int, step: int, logs: Mapping[str, Any], *, has_all_logs: bool = False) -> str:
        """Return the name of the file for a state; one that is being written must be complete.

        The file of another state keeps its name, and this one gets a number: ``m-1.2-1.ckpt``. A pattern without a
        placeholder means one file, so with it only the best keeps its name.

        Args:
            epoch: From 0.
            step: Optimizer steps done.
            logs: Of the last finished epoch.
            has_all_logs: Whether a key that is not among them is unknown, and an error. Otherwise, as before the first
                epoch's end and after an epoch without validation, the pattern gives way to the default.

        Raises:
            TrainerError: The pattern uses an unknown key, or makes a name that is no plain file name.
        """
        try:
            name = self._filename.format(**{**logs, "epoch": epoch, "step": step})
        except (KeyError, ValueError, IndexError) as error:
            if isinstance(error, KeyError) and not has_all_logs:
                name = DEFAULT_FILENAME.format(epoch=epoch, step=step)
            else:
                raise TrainerError(
                    "checkpoint.filename",
                    received=f"{self._filename!r} ({error!r})",
                    expected=f"a pattern of {['epoch', 'step', *logs]}",
                ) from error
        return self._free(_file_name(self._filename, name), step)

    def save(
        self,
        name: str,
        content: dict[str, Any],
        *,
        is_ranked: bool,
        seconds: float,
        timeout_error: Callable[[float], TrainerError] = checkpoint_timeout,
    ) -> Path:
        """Write a checkpoint, set the links and delete what is not to be kept.

        Args:
            name: Of the file, from `name_for`; one that exists is replaced.
            content: Plain data, see `to_plain`. Its ``"best"``, ``"is_ranked"`` and ``"file"`` are set here.
            is_ranked: Whether its metrics are those of the state that is saved.
            seconds: How long writing may take.
            timeout_error: Makes the error for a save that takes longer.

        Returns:
            The path.

        Raises:
            TrainerError: From ``timeout_error``; no file has changed.
        """
        value = self._value_in(content) if is_ranked else None
        best = self.best
        replaced = next((file for file in self.files if file.name == name), None)
        if value is not None and self._is_better(value):
            best = {"metric": self._monitor, "value": value, "file": name}
        elif best is not None and best["file"] == name:
            if replaced is not None and replaced.step == content["global_step"]:
                value = best["value"]
            else:
                # Somebody removed the best, or it is damaged, and this state got its name.
                best = {**best, "file": None}
        content["best"] = None if best is None else dict(best)
        content["is_ranked"] = is_ranked
        content["file"] = name
        path = self.folder / name
        self._keep_damaged(name)
        write_checkpoint(content, path, time.monotonic() + seconds, lambda: timeout_error(seconds))
        self.best = best
        self.files = [file for file in self.files if file.name != name]
        self.files.append(CheckpointFile(name, content["global_step"], _place_in(content["resume_state"]), value))
        self._link(LATEST, name)
        if best is not None and best["file"] is None:
            (self.folder / BEST).unlink(missing_ok=True)
        elif best is not None and best["file"] == name:
            self._link(BEST, name)
        self._rotate()
        return path

    def has_one_name(self) -> bool:
        """Whether the pattern has no placeholder: a state replaces the one before, unless that is the best."""
        return "{" not in self._filename.replace("{{", "")

    def set_aside_later_than(self, start: Mapping[str, Any] | None) -> None:
        """Rename the checkpoints of a part of the run that is given up: the newest would be taken for the run's own.

        Args:
            start: Content from which the run goes on; None if it begins anew.
        """
        here = None if start is None else (start["global_step"], _place_in(start["resume_state"]))
        later = [file for file in self.files if here is None or (file.step, file.place) > here]
        if not later:
            return
        for file in later:
            (self.folder / file.name).replace(self.folder / (file.name + SET_ASIDE))
        self.files = [file for file in self.files if file not in later]
        newest = self.files[-1].name if self.files else None
        best = None if start is None or start["best"] is None else start["best"]["file"]
        for link, target in ((LATEST, newest), (BEST, best)):
            path = self.folder / link
            if path.is_symlink() and not path.exists():
                path.unlink()
                if target in {file.name for file in self.files}:
                    self._link(link, target)
        flush_folder(self.folder)
        _LOGGER.warning(
            "%s: the run begins before the checkpoints %s, which are given up: their names now end in %r. Remove them "
            "if they are not needed",
            self.folder,
            [file.name for file in later],
            SET_ASIDE,
        )

    def _free(self, name: str, step: int) -> str:
        """The name that a state has already, else this one or the next that no file to be kept has."""
        stem = name.removesuffix(".ckpt")
        numbered = re.compile(re.escape(stem) + r"(-\d+)?\.ckpt")
        for file in self.files:
            if file.step == step and file.is_own and numbered.fullmatch(file.name):
                return file.name
        best = None if self.best is None else self.best["file"]
        taken = {file.name for file in self.files if not self.has_one_name() or file.name == best or not file.is_own}
        candidates = itertools.chain([name], (f"{stem}-{number}.ckpt" for number in itertools.count(1)))
        return next(candidate for candidate in candidates if candidate not in taken)

    def _keep_damaged(self, name: str) -> None:
        """Rename a damaged file in whose place another one is written: something may be saved from it."""
        if name not in self.damaged:
            return
        self.damaged.remove(name)
        path, number = self.folder / (name + DAMAGED), 1
        while path.exists():
            path, number = self.folder / f"{name}{DAMAGED}.{number}", number + 1
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).replace(path)
            _LOGGER.warning("%s is damaged, and a new checkpoint has its name: it is %s now", name, path.name)

    def _refusal(self) -> TrainerError:
        return TrainerError(
            "checkpoint_dir",
            received=f"{self.folder}, in which another process trains",
            expected="a folder of this run alone",
            fix="Wait for the other process, or use another folder or experiment_name.",
        )

    def _value_in(self, content: Mapping[str, Any]) -> float | None:
        value = content["metrics"].get(self._monitor) if self._monitor else None
        if value is None or not content.get("is_ranked", True) or math.isnan(value):
            return None
        return float(value)

    def _is_better(self, value: float) -> bool:
        if self.best is None or self.best["metric"] != self._monitor:
            return True
        return value < self.best["value"] if self._mode == "min" else value > self.best["value"]

    def _rotate(self) -> None:
        if self._keep == -1:
            return
        best = None if self.best is None else self.best["file"]
        kept = {self.files[-1].name, *(file.name for file in self.files if file.name == best)}
        for file in sorted((file for file in self.files if file.is_own), key=self._rank):
            if len(kept) < self._keep:
                kept.add(file.name)
        for file in self.files:
            if file.is_own and file.name not in kept:
                (self.folder / file.name).unlink(missing_ok=True)
        self.files = [file for file in self.files if file.name in kept or not file.is_own]

    def _rank(self, file: CheckpointFile) -> tuple[bool, float, int]:
        """Sorts what is to be kept first to the front: by value, then the newest."""
        age = -self.files.index(file)
        if file.value is None:
            return True, 0.0, age
        return False, file.value if self._mode == "min" else -file.value, age

    def _link(self, link: str, target: str) -> None:
        path = self.folder / link
        if path.exists() and not path.is_symlink():
            path.replace(self.folder / (link + SET_ASIDE))
            _LOGGER.warning("%s was a file, not the link that belongs there; its name now ends in %r", path, SET_ASIDE)
        temporary = self.folder / f".{link}.{uuid4().hex}.tmp"
        try:
            temporary.symlink_to(target)
        except OSError as error:
            if error.errno in _FULL:
                raise
            # The checkpoint itself is complete, and nothing here needs the links.
            if self._makes_links:
                _LOGGER.warning("%s: no link can be made there (%s), so there is none", path, error)
            self._makes_links = False
            path.unlink(missing_ok=True)
            return
        temporary.replace(path)
        flush_folder(self.folder)


def check_filename(pattern: str) -> None:
    """Refuse a pattern that can name no file, whatever the metrics in it will be.

    Args:
        pattern: As for `CheckpointStore`.

    Raises:
        TrainerError: It is broken, or makes a name that is no plain file name.

    Example:
        >>> check_filename("{step}-{val_loss:.3f}.ckpt")
    """
    try:
        name = pattern.format_map(defaultdict(_Metric, epoch=0, step=0))
    except (ValueError, TypeError, AttributeError) as error:
        raise TrainerError(
            "checkpoint.filename",
            received=f"{pattern!r} ({error!r})",
            expected="a pattern of 'epoch', 'step' and metrics, such as '{epoch}-{val_loss:.3f}.ckpt'",
        ) from error
    _file_name(pattern, name)


class _Metric(float):
    """Of which it is not known what it will be."""

    def __format__(self, spec: str) -> str:
        return "0"


def _file_name(pattern: str, name: str) -> str:
    if not name.endswith(".ckpt"):
        name += ".ckpt"
    if Path(name).name != name or name in (LATEST, BEST) or name.startswith("."):
        raise TrainerError(
            "checkpoint.filename",
            received=f"{pattern!r}, which gives {name!r}",
            expected=f"a file name without folders, other than {LATEST} and {BEST}",
        )
    return name


def _place_in(resume_state: Mapping[str, Any]) -> tuple[int, ...]:
    """Tells checkpoints of one step apart: epoch, what was finished in it, batches of training and of validation."""
    train, val = resume_state["train"] or {}, resume_state["val"] or {}
    phase = _FINISHED.index(resume_state["phase"]) if resume_state["phase"] in _FINISHED else -1
    return resume_state["epoch"], phase, train.get("batch_idx", 0), val.get("batch_idx", 0)
