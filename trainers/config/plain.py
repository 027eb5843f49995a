"""Values as they can be written to a file and read back equal: text, numbers, true, false, null, lists and dicts."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Mapping
from typing import Any

from trainers.config.errors import ConfigurationError, problem

_FIX = "Give text, numbers, true, false, null, lists or dicts of them."


def plain(value: Any) -> Any:
    """Return an independent copy in plain types: tuples, ranges and arrays become lists, paths become text.

    Args:
        value: Anything; what has no plain counterpart is returned as it is, for `plain_problems` to report.

    Returns:
        The copy, which shares no dict or list with ``value``.

    Raises:
        ConfigurationError: A dict or list contains itself.

    Example:
        >>> plain({"betas": (0.9, 0.999), "sizes": range(2)})
        {'betas': [0.9, 0.999], 'sizes': [0, 1]}
    """
    return _plain(value, ())


def _plain(value: Any, around: tuple[int, ...]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, around)
    for kind in (int, float, str):
        if isinstance(value, kind):
            # The base's own conversion: a subclass may print itself in another way.
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if id(value) in around:
        raise ConfigurationError(f"A {type(value).__name__} contains itself; expected values that end somewhere.")
    inside = (*around, id(value))
    if isinstance(value, Mapping):
        return {_plain_key(key): _plain(entry, inside) for key, entry in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(entry, inside) for entry in value]
    if hasattr(value, "tolist"):
        # Scalars and arrays of numpy, tensors: known by their method, as none of these packages is imported here.
        return _plain(value.tolist(), inside)
    return value


def _plain_key(key: Any) -> Any:
    return plain(key) if isinstance(key, str) else key


def plain_problems(value: Any, key: str) -> list[str]:
    """Return what in a plain copy could not be written and read back equal.

    Args:
        value: What `plain` returned.
        key: Its dotted key; empty for a whole configuration.

    Returns:
        One text a problem.

    Example:
        >>> plain_problems({"a": [1.0, float("nan")]}, "custom_params")
        ['custom_params.a[1]: received nan; expected a finite number']
    """
    if isinstance(value, dict):
        found = []
        for name, entry in value.items():
            below = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str):
                found.append(problem(below, name, "text as key", "Quote the key."))
            found += plain_problems(entry, below)
        return found
    if isinstance(value, list):
        return [text for index, entry in enumerate(value) for text in plain_problems(entry, f"{key}[{index}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [problem(key, value, "a finite number")]
    if isinstance(value, str):
        return [] if _is_unicode(value) else [problem(key, value, "valid Unicode text")]
    return (
        [] if value is None or isinstance(value, (bool, int, float)) else [problem(key, value, "a plain value", _FIX)]
    )


def _is_unicode(text: str) -> bool:
    # Lone surrogates, as they come from undecodable file names, cannot be written to a file.
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
