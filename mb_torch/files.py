"""Model states on disk: one file per model, each written whole or not at all."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from mb_torch.errors import InvalidState, MissingState
from mb_torch.state import ModelState

_LOGGER = logging.getLogger(__name__)


def save_states(states: Sequence[Mapping[str, Tensor]], folder: str | os.PathLike[str]) -> None:
    """Write ``folder/model_{i}.pt`` for every model, as CPU tensors that ``torch.load(weights_only=True)`` opens.

    Each file is replaced atomically: after a crash it holds the old state or the new one, never a part.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_states([{"weight": torch.zeros(2)}], folder)
        ...     load_states(folder, 1)
        [{'weight': tensor([0., 0.])}]
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index, state in enumerate(states):
        values = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
        save_atomically(values, _file(folder, index))


def load_states(folder: str | os.PathLike[str], num_models: int) -> list[ModelState]:
    """Read ``folder/model_{i}.pt`` for every model.

    Raises:
        MissingState: A file is missing; it is also a ``FileNotFoundError``.
        InvalidState: A file is truncated or no model state.
    """
    folder = Path(folder)
    missing = [i for i in range(num_models) if not _file(folder, i).is_file()]
    if missing:
        listed = ", ".join(str(_file(folder, i)) for i in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise MissingState(
            f"{len(missing)} of {num_models} model files do not exist: {listed}", fix="Nothing was loaded."
        )
    numbers = (re.fullmatch(r"model_(\d+)\.pt", entry.name) for entry in folder.iterdir())
    extra = sum(1 for number in numbers if number and int(number[1]) >= num_models)
    if extra:
        _LOGGER.warning("%s: %d model files beyond the %d models to load were left alone", folder, extra, num_models)
    return [_load(_file(folder, i)) for i in range(num_models)]


def save_atomically(value: Any, path: Path) -> None:
    """``torch.save`` to a temporary file beside ``path``, flush it to disk, then rename it over ``path``."""
    # A name of its own for every call: threads and machines may save to one folder.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            torch.save(value, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _file(folder: Path, index: int) -> Path:
    return folder / f"model_{index}.pt"


def _load(path: Path) -> ModelState:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no one error for a damaged file
        # Further lines of torch's message advise to open files without its safety.
        cause = str(error).strip().split("\n", 1)[0].split(". ", 1)[0]
        raise InvalidState(f"{path} cannot be read: {cause}", fix="Nothing was loaded.") from error
    if not isinstance(state, dict):
        raise InvalidState(f"{path}", received=type(state).__name__, expected="a state_dict", fix="Nothing was loaded.")
    return state
