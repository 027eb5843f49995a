"""What a recorded program is specialised on, beside the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

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

    Example:
        >>> constant_key(1) == constant_key(True), constant_key([]) == constant_key([])
        (False, False)
    """
    try:
        hash(leaf)
    except TypeError:
        return Same(leaf)
    return type(leaf), leaf


def surroundings() -> Hashable:
    """Settings of PyTorch that change what functions do.

    Example:
        >>> surroundings()
        (torch.float32, False)
    """
    autocast = torch.is_autocast_enabled("cpu")
    return torch.get_default_dtype(), autocast and torch.get_autocast_dtype("cpu")
