"""The checkpoints of a run: which file is the newest and which the best, and how many are kept."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from trainers.checkpoint_files import flush_folder, read_checkpoint, read_header, write_checkpoint
from trainers.errors import DamagedCheckpointError, MissingCheckpointError, TrainerError

DEFAULT_FILENAME = "epoch_{epoch:03d}_step_{step:06d}.ckpt"
LATEST, BEST = "latest.ckpt", "best.ckpt"
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
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


@dataclass
class CheckpointFile:
    """A checkpoint on disk.

    Attributes:
        name: Of the file, in the checkpoint folder.
        step: Optimizer steps done.
        place: How far the run was, to be compared; not the time, since clocks jump.
        value: Of the monitored metric; None for saves within an epoch.
    """

    name: str
    step: int
    place: tuple[int, ...]
    value: float | None


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
        best: ``{"metric", "value", "file"}``; None before the first monitored value.
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
        self.folder = folder
        self.files: list[CheckpointFile] = []
        self.best: dict[str, Any] | None = None
        self._filename = filename
        self._keep = keep
        self._monitor = monitor
        self._mode = mode

    def open(self) -> None:
        """Make the folder, remove what killed saves have left, and look through the files there are.

        Raises:
            TrainerError: There is no such folder, and none can be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainerError(
                f"checkpoint_dir: the folder {self.folder} cannot be made ({error})", fix="Choose another one."
            ) from error
        for path in sorted(self.folder.iterdir()):
            if _TEMPORARY.fullmatch(path.name):
                # Who only looks at a finished run may have no right to.
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        self.look()

    def look(self) -> None:
        """Look through the files there are; one that cannot be read is left where it is, with a warning."""
        self.files = []
        for path in sorted(self.folder.glob("*.ckpt")):
            if path.is_file() and not path.is_symlink():
                try:
                    content = read_header(path)
                except DamagedCheckpointError as error:
                    _LOGGER.warning("%s; the file is skipped", error)
                    continue
                self.files.append(
                    CheckpointFile(
                        path.name,
                        content["global_step"],
                        _place_in(content["resume_state"]),
                        self._value_in(content),
                    )
                )
        self.files.sort(key=lambda file: (file.step, file.place))

    def newest(self) -> dict[str, Any]:
        """Read the newest file that is undamaged.

        Raises:
            MissingCheckpointError: There is none.
        """
        for file in reversed(self.files):
            try:
                return read_checkpoint(self.folder / file.name)
            except DamagedCheckpointError as error:
                _LOGGER.warning("%s; an older checkpoint is used", error)
        raise MissingCheckpointError(
            "no checkpoint to load",
            received=f"the folder {self.folder}",
            expected="a .ckpt file that can be read",
            fix="Give load_checkpoint() a path, or train first.",
        )

    def name_for(self, epoch: int, step: int, logs: Mapping[str, Any]) -> str:
        """Return the name of the file for a state.

        Args:
            epoch: From 0.
            step: Optimizer steps done.
            logs: Of the last finished epoch. Before there are any, a pattern that uses them gives way to the default.

        Raises:
            TrainerError: The pattern uses an unknown key, or makes a name that is no plain file name.
        """
        try:
            name = self._filename.format(**{**logs, "epoch": epoch, "step": step})
        except (KeyError, ValueError, IndexError) as error:
            if isinstance(error, KeyError) and not logs:
                name = DEFAULT_FILENAME.format(epoch=epoch, step=step)
            else:
                raise TrainerError(
                    "checkpoint.filename",
                    received=f"{self._filename!r} ({error!r})",
                    expected=f"a pattern of {['epoch', 'step', *logs]}",
                ) from error
        if not name.endswith(".ckpt"):
            name += ".ckpt"
        if Path(name).name != name or name in (LATEST, BEST) or name.startswith("."):
            raise TrainerError(
                "checkpoint.filename",
                received=f"{self._filename!r}, which gives {name!r}",
                expected=f"a file name without folders, other than {LATEST} and {BEST}",
            )
        return name

    def save(
        self,
        name: str,
        content: dict[str, Any],
        *,
        is_ranked: bool,
        deadline: float,
        timeout_error: Callable[[], TrainerError],
    ) -> Path:
        """Write a checkpoint, set the links and delete what is not to be kept.

        Args:
            name: Of the file; one that exists is replaced.
            content: Plain data, see `to_plain`. Its ``"best"`` is set here.
            is_ranked: Whether its metrics are those of the state that is saved.
            deadline: On `time.monotonic`'s clock.
            timeout_error: Makes the error for a save that is not done by then.

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
                # The pattern gives every step the same name, and this state is not the best one.
                best = {**best, "file": None}
                (self.folder / BEST).unlink(missing_ok=True)
        content["best"] = None if best is None else dict(best)
        content["is_ranked"] = is_ranked
        path = self.folder / name
        write_checkpoint(content, path, deadline, timeout_error)
        self.best = best
        self.files = [file for file in self.files if file.name != name]
        self.files.append(CheckpointFile(name, content["global_step"], _place_in(content["resume_state"]), value))
        self._link(LATEST, name)
        if best is not None and best["file"] == name:
            self._link(BEST, name)
        self._rotate()
        return path

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
        for file in sorted(self.files, key=self._rank):
            if len(kept) < self._keep:
                kept.add(file.name)
        for file in self.files:
            if file.name not in kept:
                (self.folder / file.name).unlink(missing_ok=True)
        self.files = [file for file in self.files if file.name in kept]

    def _rank(self, file: CheckpointFile) -> tuple[bool, float, int]:
        """Sorts what is to be kept first to the front: by value, then the newest."""
        age = -self.files.index(file)
        if file.value is None:
            return True, 0.0, age
        return False, file.value if self._mode == "min" else -file.value, age

    def _link(self, link: str, target: str) -> None:
        temporary = self.folder / f".{link}.{uuid4().hex}.tmp"
        temporary.symlink_to(target)
        temporary.replace(self.folder / link)
        flush_folder(self.folder)


def _place_in(resume_state: Mapping[str, Any]) -> tuple[int, ...]:
    """Tells checkpoints of one step apart: epoch, what was finished in it, batches of training and of validation."""
    train, val = resume_state["train"] or {}, resume_state["val"] or {}
    phase = _FINISHED.index(resume_state["phase"]) if resume_state["phase"] in _FINISHED else -1
    return resume_state["epoch"], phase, train.get("batch_idx", 0), val.get("batch_idx", 0)
