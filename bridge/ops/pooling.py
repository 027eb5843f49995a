"""Pooling: the largest element or the mean of each window.

Windows are taken one axis after the other, as shifted views of the whole array: XLA's own windowed reductions are slow
on CPU, above all backward and stacked over models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from numpy.typing import NDArray

from bridge.ops.registry import Operation, lowers
from bridge.ops.windows import Positions, along, per_axis, positions, views

aten = torch.ops.aten


@lowers(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool(
    operation: Operation,
    input: jax.Array,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The largest element of each window and its place in the flattened image."""
    axes = 2 if operation.target is aten.max_pool2d_with_indices.default else 3
    sizes = operation.shape[-axes:]
    windows = [
        positions(size, count, *settings)
        for size, count, *settings in zip(
            per_axis(kernel_size, axes),
            sizes,
            per_axis(stride or kernel_size, axes),
            per_axis(padding, axes),
            per_axis(dilation, axes),
            strict=True,
        )
    ]
    return _max_pool(input, windows)


@lowers(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(
    operation: Operation, input: jax.Array, output_size: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """The largest element of each of so many windows."""
    first = input.ndim - len(output_size)
    return _max_pool(input, [_adaptive(input.shape[first + axis], size) for axis, size in enumerate(output_size)])


def _adaptive(size: int, count: int) -> Positions:
    """Windows that cover an axis; -1 fills those up that are smaller than others."""
    starts = np.arange(count) * size // count
    ends = -(-(np.arange(count) + 1) * size // count)
    rows = starts[None, :] + np.arange((ends - starts).max())[:, None]
    return np.where(rows < ends[None, :], rows, -1)


def _max_pool(input: jax.Array, windows: Sequence[Positions]) -> tuple[jax.Array, jax.Array]:
    first = input.ndim - len(windows)
    places = jnp.arange(math.prod(input.shape[first:]), dtype=jnp.int32)
    indices = jnp.broadcast_to(places.reshape(input.shape[first:]), input.shape)
    # From the last axis to the first, so that of equal elements the one that comes first in memory is found.
    for axis in reversed(range(len(windows))):
        size = input.shape[first + axis]
        looked_at = windows[axis]
        inside = (looked_at >= 0) & (looked_at < size)
        input, indices = _largest(
            views(input, first + axis, looked_at), views(indices, first + axis, looked_at), first + axis, inside
        )
    return input, indices


def _largest(
    candidates: Sequence[jax.Array], indices: Sequence[jax.Array], axis: int, inside: NDArray[np.bool_]
) -> tuple[jax.Array, jax.Array]:
    """The largest of some arrays, element by element.

    Args:
        candidates: The arrays.
        indices: Numbers that go with their elements.
        axis: Axis of the windows.
        inside: ``[candidate, window]``, whether an element exists.

    Returns:
        The first of the largest elements or, as in PyTorch, the last NaN; one element alone gets the gradient. And the
        number that goes with it.
    """
    chosen = jnp.zeros(candidates[0].shape, jnp.int32)
    largest = lax.stop_gradient(candidates[0])
    number = indices[0]
    started = inside[0]
    for position, candidate in enumerate(map(lax.stop_gradient, candidates[1:]), 1):
        better = (candidate > largest) | (candidate != candidate)
        if not inside[position].all():
            better &= along(inside[position], better.ndim, axis)
        if not started.all():
            better |= along(inside[position] & ~started, better.ndim, axis)
        started = started | inside[position]
        largest = jnp.where(better, candidate, largest)
        number = jnp.where(better, indices[position], number)
        chosen = jnp.where(better, jnp.int32(position), chosen)
    return (lax.select_n(chosen, *candidates) if len(candidates) > 1 else candidates[0]), number


@lowers(aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default)
def fractional_max_pool(
    operation: Operation,
    input: jax.Array,
    kernel_size: Sequence[int],
    output_size: Sequence[int],
    random_samples: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The largest elements of windows whose distances vary with given random numbers."""
    axes = len(output_size)
    first = input.ndim - axes
    shape = input.shape
    samples = random_samples if input.ndim == axes + 2 else random_samples[0]
    places = jnp.arange(math.prod(shape[first:]), dtype=jnp.int32)
    indices = jnp.broadcast_to(places.reshape(shape[first:]), shape)
    for axis in reversed(range(axes)):
        # In two dimensions the first number is for the columns; in three it is for the first axis.
        sample = samples[..., axes - 1 - axis if axes == 2 else axis]
        starts = _starts(sample, shape[first + axis], output_size[axis], kernel_size[axis])
        starts = starts.reshape(*starts.shape[:-1], *[1] * axis, -1, *[1] * (axes - 1 - axis))
        looked_at = [starts + place for place in range(kernel_size[axis])]
        inside = np.ones((kernel_size[axis], output_size[axis]), bool)
        input, indices = _largest(
            [jnp.take_along_axis(input, at, first + axis) for at in looked_at],
            [jnp.take_along_axis(indices, at, first + axis) for at in looked_at],
            first + axis,
            inside,
        )
    return input, indices


def _starts(sample: jax.Array, size: int, count: int, kernel: int) -> jax.Array:
    """First positions of windows, ``[..., count]``: nearly equal distances, shifted by the sample."""
    last = jnp.full((*sample.shape, 1), size - kernel, jnp.int32)
    if count == 1:
        return last
    distance = jnp.asarray((size - kernel) / (count - 1), sample.dtype)
    steps = jnp.arange(count - 1, dtype=sample.dtype)
    shifted = sample[..., None]
    starts = ((steps + shifted) * distance).astype(jnp.int32) - (shifted * distance).astype(jnp.int32)
    return jnp.concatenate([starts, last], -1)


@lowers(aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    operation: Operation,
    input: jax.Array,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    """The mean of each window."""
    axes = 2 if operation.target is aten.avg_pool2d.default else 3
    first = input.ndim - axes
    counts: NDArray[np.int64] = np.ones((1,) * input.ndim, np.int64)
    for axis, (size, step, pad) in enumerate(
        zip(per_axis(kernel_size, axes), per_axis(stride or kernel_size, axes), per_axis(padding, axes), strict=True),
        first,
    ):
        looked_at = positions(size, operation.shape[axis], step, pad, 1)
        length = input.shape[axis]
        # Padding counts, what lies beyond it (in a last, incomplete window) does not.
        inside = looked_at < length + pad if count_include_pad else (looked_at >= 0) & (looked_at < length)
        counts = counts * along(inside.sum(0), input.ndim, axis)
        input = _sum_windows(input, axis, looked_at)
    divisor = np.asarray(counts if divisor_override is None else divisor_override)
    return input / divisor.astype(input.dtype)


def _sum_windows(input: jax.Array, axis: int, looked_at: Positions) -> jax.Array:
    if looked_at.shape[1] == 1 and looked_at[0, 0] == 0 and len(looked_at) == input.shape[axis]:
        return input.sum(axis, keepdims=True)
    first, *others = views(input, axis, looked_at)
    for other in others:
        first = first + other
    return first


@lowers(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
def adaptive_avg_pool(operation: Operation, input: jax.Array, output_size: Sequence[int]) -> jax.Array:
    """The means of so many windows."""
    first = input.ndim - len(output_size)
    for axis, count in enumerate(output_size, first):
        looked_at = _adaptive(input.shape[axis], count)
        inside = looked_at >= 0
        if inside.all():
            total = _sum_windows(input, axis, looked_at)
        else:
            total = jnp.zeros((), input.dtype)
            for row, view in zip(inside, views(input, axis, looked_at), strict=True):
                total = total + jnp.where(along(row, input.ndim, axis), view, jnp.zeros_like(view))
        input = total / along(inside.sum(0), input.ndim, axis).astype(input.dtype)
    return input
