"""Data sets that stay on the device between calls."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bridge.taken import is_written_by_torch_only
from mb_jax.sharding import Layout


class ResidentData:
    """Arrays of tensors, copied to the device once; again if a tensor was changed in place.

    What NumPy shares the memory of, or another process, is copied each time: nothing shows when they write to it.

    Example:
        >>> import torch
        >>> from mb_jax.sharding import ONE_DEVICE
        >>> data, resident = torch.ones(3, 2), ResidentData()
        >>> resident.placed([data], [False], ONE_DEVICE)[0] is resident.placed([data], [False], ONE_DEVICE)[0]
        True
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, Layout], tuple[weakref.ref[Tensor], int, Any]] = {}

    def placed(self, tensors: Sequence[Tensor], mapped: Sequence[bool], layout: Layout) -> list[Any]:
        """Return the arrays of some tensors, each with or without values per model."""
        return [self._placed(tensor, flag, layout) for tensor, flag in zip(tensors, mapped, strict=True)]

    def _placed(self, tensor: Tensor, mapped: bool, layout: Layout) -> Any:
        if not is_written_by_torch_only(tensor):
            return _brought(tensor, mapped, layout)
        key = id(tensor), layout
        known = self._arrays.get(key)
        if known is None or known[0]() is not tensor or known[1] != tensor._version:
            self._arrays = {place: entry for place, entry in self._arrays.items() if entry[0]() is not None}
            known = self._arrays[key] = weakref.ref(tensor), tensor._version, _brought(tensor, mapped, layout)
        return known[2]

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._arrays = {}


def _brought(tensor: Tensor, mapped: bool, layout: Layout) -> Any:
    return layout.place(tensor) if mapped else layout.share(tensor)
