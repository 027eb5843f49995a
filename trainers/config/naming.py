"""Names of experiments: legal as a directory, a git ref and a job name, and no two of a search alike.

A name matches ``[A-Za-z0-9][A-Za-z0-9._=+-]*``, has no ``..``, does not end in ``.`` or ``.lock`` and has at most
200 characters. Two names differ even where capitals do not count.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any

MAX_LENGTH = 200
# Of the part of a descriptive name that stands for the parameters.
MAX_DESCRIPTION = 120
DIGITS = 8
TIMESTAMP_DIGITS = 6
# How many digits more each time that two names collide.
MORE_DIGITS = 4

_ILLEGAL = re.compile(r"[^A-Za-z0-9._=+-]")


class NamingStrategy(Enum):
    """How the experiments of a grid search are called, each after the base name and an underscore.

    Attributes:
        HASH_BASED: Eight digits of a hash of the parameters, more where two collide: ``base_1f3a90c2``.
        DESCRIPTIVE: The parameters: ``base_hidden_size=256_lr=0.001``.
        SEQUENTIAL: A running number: ``base_0007``.
        TIMESTAMP_BASED: When the search was made, and six digits of the hash: ``base_20260131_120000_1f3a90``.
        PARAMETER_BASED: The same as DESCRIPTIVE.

    Example:
        >>> NamingStrategy("descriptive") is NamingStrategy.PARAMETER_BASED
        True
    """

    HASH_BASED = "hash_based"
    DESCRIPTIVE = "descriptive"
    SEQUENTIAL = "sequential"
    TIMESTAMP_BASED = "timestamp_based"
    PARAMETER_BASED = "descriptive"


def legal_name(text: str) -> str:
    """Bring a text into the set of legal names; a legal name stays as it is.

    Args:
        text: Any text.

    Returns:
        The text with ``_`` for what is not allowed.

    Example:
        >>> legal_name("my sweep/1"), legal_name("sweep-1")
        ('my_sweep_1', 'sweep-1')
    """
    name = re.sub(r"\.{2,}", "_", _ILLEGAL.sub("_", text)).lstrip("._=+-")[:MAX_LENGTH]
    name = re.sub(r"\.lock$", "_lock", re.sub(r"\.$", "_", name))
    return name or "experiment"


def experiment_names(
    bases: Sequence[str],
    parameters: Sequence[Mapping[str, Any]],
    strategy: NamingStrategy,
    moment: datetime | None = None,
) -> list[str]:
    """Name the experiments of a search.

    Args:
        bases: The base name of each experiment; brought into the set of legal names.
        parameters: The parameters of each experiment, plain values under canonical dotted keys. All differ.
        strategy: How to name them.
        moment: When the search was made, for names with a time. Default: now.

    Returns:
        Legal names in the same order, no two alike even if capitals do not count.

    Example:
        >>> rates = [{"model.dropout": 0.1}, {"model.dropout": 1.0}]
        >>> experiment_names(["run", "run"], rates, NamingStrategy.DESCRIPTIVE)
        ['run_dropout=0.1', 'run_dropout=1.0']
    """
    width = max(4, len(str(len(parameters) - 1)))
    time = f"{moment or datetime.now():%Y%m%d_%H%M%S}"
    digests = [_hash(values) for values in parameters]
    short = _short_keys({key for values in parameters for key in values})
    texts = ["_".join(f"{short[key]}={_text(value)}" for key, value in values.items()) for values in parameters]

    def draft(index: int, base: str, collisions: int) -> str:
        if strategy is NamingStrategy.SEQUENTIAL:
            return _join(base, f"{index:0{width}d}")
        if strategy is NamingStrategy.TIMESTAMP_BASED:
            return _join(base, f"{time}_{digests[index][: TIMESTAMP_DIGITS + MORE_DIGITS * collisions]}")
        if strategy is NamingStrategy.HASH_BASED:
            return _join(base, digests[index][: DIGITS + MORE_DIGITS * collisions])
        return _join(base, _description(texts[index], digests[index], collisions))

    legal = [legal_name(base) for base in bases]
    collisions = [0] * len(parameters)
    while True:
        names = [draft(index, base, count) for index, (base, count) in enumerate(zip(legal, collisions, strict=True))]
        uses = Counter(name.casefold() for name in names)
        alike = [index for index, name in enumerate(names) if uses[name.casefold()] > 1]
        if not alike:
            return names
        for index in alike:
            collisions[index] += 1
            if MORE_DIGITS * collisions[index] > len(digests[index]):
                raise ValueError(f"received the parameters {parameters[index]} twice; expected different ones")


def _join(base: str, tail: str) -> str:
    return f"{base[: MAX_LENGTH - 1 - len(tail)]}_{tail}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _description(text: str, digest: str, collisions: int) -> str:
    """The text itself, or with digits at its end if it is too long or another one reads the same."""
    doubts = collisions + (len(text) > MAX_DESCRIPTION)
    if not doubts:
        return text
    digits = digest[: DIGITS + MORE_DIGITS * (doubts - 1)]
    return f"{text[: MAX_DESCRIPTION - 1 - len(digits)]}-{digits}"


def _short_keys(keys: Iterable[str]) -> dict[str, str]:
    """For each key its shortest ending that belongs to no other key."""
    endings = {key: [".".join(key.split(".")[-count:]) for count in range(1, key.count(".") + 2)] for key in keys}
    uses = Counter(ending.casefold() for own in endings.values() for ending in own)
    return {
        key: _changed(next((ending for ending in own if uses[ending.casefold()] == 1), key))
        for key, own in endings.items()
    }


def _text(value: Any) -> str:
    """A value as it is read in a name; with digits at its end if that is not the whole truth."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _with_digits(value, value) if _reads_as_another_type(value) else _changed(value)
    return _with_digits(json.dumps(value, sort_keys=True), value)


def _changed(text: str) -> str:
    """The text if it may be part of a name as it is, else what may, and digits."""
    legal = _clean(text) == text and text and not text.endswith((".", ".lock"))
    return text if legal else _with_digits(text, text)


def _with_digits(text: str, value: Any) -> str:
    return f"{_clean(text)}-{_hash(value)[:DIGITS]}"


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+|\.{2,}", "_", text).strip("_")


def _reads_as_another_type(text: str) -> bool:
    if text.lower() in {"true", "false", "none"}:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
