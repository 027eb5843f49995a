"""What a recorded program is specialised on, beside the shapes of its inputs."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Hashable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class Same:
    """Equal to what holds the same object; for objects without a hash, and for tensors.

    It keeps the object, so that no other one can get its identity.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def constant_key(leaf: Any) -> Hashable:
    """Equal for constants that a program may be shared for.

    Numbers, text, NumPy arrays and what is made of these alone (lists, dicts, namespaces, dataclasses) count by their
    values, which may be changed in place. Of everything else it has to be the same object, or an equal one if it has a
    hash.

    Example:
        >>> constant_key(1) == constant_key(True), constant_key([1, 2]) == constant_key([1, 2])
        (False, True)
        >>> anything = object()
        >>> constant_key([anything]) == constant_key([anything])
        False
    """
    key = value_key(leaf)
    if key is not None:
        return key
    try:
        hash(leaf)
    except TypeError:
        return Same(leaf)
    return type(leaf), leaf


def value_key(leaf: Any) -> Hashable | None:
    """Equal for equal plain values and what is made of these alone; None for everything else.

    Example:
        >>> value_key({"rate": 0.5}) == value_key({"rate": 0.5}), value_key([torch.ones(1)])
        (True, None)
    """
    try:
        return _key_of_values(leaf, frozenset())
    except _NotOfValues:
        return None


class _NotOfValues(Exception):
    """Something is not made of plain values alone."""


PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))


def _key_of_values(value: Any, holders: frozenset[int]) -> Hashable:
    cls = type(value)
    if cls in PLAIN:
        return cls, value
    if cls is np.ndarray and not value.dtype.hasobject:
        return cls, value.shape, value.dtype.str, value.tobytes()
    if id(value) in holders:
        raise _NotOfValues
    return cls, tuple([_key_of_values(part, holders | {id(value)}) for part in _parts(value)])


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        return value
    if type(value) is dict:
        return value.items()
    if isinstance(value, (Namespace, SimpleNamespace)):
        return vars(value).items()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    raise _NotOfValues


def surroundings() -> Hashable:
    """Settings of PyTorch that change what functions do.

    Example:
        >>> surroundings()
        (torch.float32, False)
    """
    autocast = torch.is_autocast_enabled("cpu")
    return torch.get_default_dtype(), autocast and torch.get_autocast_dtype("cpu")
