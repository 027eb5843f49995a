"""Views of arrays at the positions that the windows of a convolution or pooling look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax import lax
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

Positions = NDArray[np.int64]
"""``positions[k, i]``: where the ``k``-th element of window ``i`` lies along an axis; outside of it for padding."""


def positions(size: int, windows: int, stride: int, padding: int, dilation: int) -> Positions:
    """Where windows at regular distances look, along one axis.

    Args:
        size: Elements in a window.
        windows: Number of windows.
        stride: Distance of neighbouring windows.
        padding: Positions before the first element that the first window covers.
        dilation: Distance of neighbouring elements of one window.
    """
    return np.arange(size)[:, None] * dilation + np.arange(windows)[None, :] * stride - padding


def padded(array: jax.Array, axis: int, low: int, high: int) -> jax.Array:
    """The array with zeros around it along one axis; with less of it where a number is negative."""
    if low == 0 and high == 0:
        return array
    widths = [(0, 0, 0)] * array.ndim
    widths[axis] = (low, high, 0)
    return lax.pad(array, np.zeros((), array.dtype), widths)


def views(array: jax.Array, axis: int, looked_at: Positions) -> list[jax.Array]:
    """The elements at the positions, zero outside, one array for each place within the windows."""
    low = max(0, -int(looked_at.min()))
    high = max(0, int(looked_at.max()) - array.shape[axis] + 1)
    source = padded(array, axis, low, high)
    return [_view(source, axis, row + low) for row in looked_at]


def _view(array: jax.Array, axis: int, where: NDArray[np.int64]) -> jax.Array:
    steps = np.diff(where)
    if len(steps) == 0 or (steps[0] > 0 and (steps == steps[0]).all()):
        step = int(steps[0]) if len(steps) else 1
        return lax.slice_in_dim(array, int(where[0]), int(where[-1]) + 1, step, axis)
    return jax.numpy.take(array, where, axis=axis, mode="clip")


def along(vector: NDArray[Scalar], ndim: int, axis: int) -> NDArray[Scalar]:
    """A vector shaped to broadcast along one axis of an array."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.reshape(shape)


def per_axis(values: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One number for each of the axes, as PyTorch spreads a single one over all."""
    several = (values,) if isinstance(values, int) else tuple(values)
    return several * count if len(several) == 1 else several


__all__ = ["Positions", "along", "padded", "per_axis", "positions", "views"]
