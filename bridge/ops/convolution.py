"""Convolutions, as XLA's own operation or as one matrix multiplication.

Stacked over models with weights of their own, XLA's operation becomes a grouped convolution, whose backward on CPU is
tens of times slower than a batched matrix multiplication.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from bridge.ops.memory import in_memory
from bridge.ops.registry import Operation, lowers
from bridge.ops.windows import padded, per_axis

aten = torch.ops.aten


class _Windows(NamedTuple):
    """How a kernel moves over an image: one number per spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@lowers(aten.convolution.default)
def convolution(
    operation: Operation,
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    """Convolve ``input [N, C, *sizes]``; ``weight`` is ``[O, C/groups, *kernel]``, or ``[C, O/groups, *kernel]``."""
    axes = input.ndim - 2
    windows = _Windows(weight.shape[2:], per_axis(stride, axes), per_axis(padding, axes), per_axis(dilation, axes))
    compute = _FORMS[operation.convolution, transposed]
    output = compute(input, weight, windows, operation.shape[2:], groups)
    return output if bias is None else output + bias.reshape(-1, *[1] * axes)


_Form = Callable[[jax.Array, jax.Array, _Windows, tuple[int, ...], int], jax.Array]


def _native(input: jax.Array, weight: jax.Array, windows: _Windows, sizes: tuple[int, ...], groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        input,
        weight,
        window_strides=windows.stride,
        padding=[(padding, padding) for padding in windows.padding],
        rhs_dilation=windows.dilation,
        feature_group_count=groups,
    )


def _native_transposed(
    input: jax.Array, weight: jax.Array, windows: _Windows, sizes: tuple[int, ...], groups: int
) -> jax.Array:
    """A convolution of the input spread out by the stride, with the kernel turned around."""
    per_group = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    turned = jnp.flip(per_group.reshape(-1, *per_group.shape[2:]), range(2, weight.ndim))
    widths = []
    for axis, size in enumerate(sizes):
        low = windows.dilation[axis] * (windows.kernel[axis] - 1) - windows.padding[axis]
        spread = (input.shape[2 + axis] - 1) * windows.stride[axis] + 1
        reach = windows.dilation[axis] * (windows.kernel[axis] - 1)
        widths.append((low, size + reach - spread - low))
    return lax.conv_general_dilated(
        input,
        turned,
        window_strides=[1] * len(sizes),
        padding=widths,
        lhs_dilation=windows.stride,
        rhs_dilation=windows.dilation,
        feature_group_count=groups,
    )


def _matmul(input: jax.Array, weight: jax.Array, windows: _Windows, sizes: tuple[int, ...], groups: int) -> jax.Array:
    images = jnp.moveaxis(input, 1, -1)
    columns = _columns(images, _Gathering(images.shape, windows, sizes))
    output = _product(columns, _as_matrices(weight, groups), across=False)
    return jnp.moveaxis(output.reshape(input.shape[0], *sizes, weight.shape[0]), -1, 1)


def _matmul_transposed(
    input: jax.Array, weight: jax.Array, windows: _Windows, sizes: tuple[int, ...], groups: int
) -> jax.Array:
    """The products of all kernel positions, each added where it belongs: the transpose of gathering columns."""
    images = jnp.moveaxis(input, 1, -1)
    count, *counts, channels = images.shape
    columns = _product(images.reshape(-1, channels), _as_matrices(weight, groups), across=True)
    shape = (count, *sizes, weight.shape[1] * groups)
    return jnp.moveaxis(_added_up(columns, _Gathering(shape, windows, tuple(counts))), -1, 1)


def _as_matrices(weight: jax.Array, groups: int) -> jax.Array:
    """``[O, C, *kernel]`` as ``[groups, O/groups, kernel positions, C]``."""
    matrices = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    return matrices.swapaxes(2, 3)


def _product(rows: jax.Array, matrices: jax.Array, across: bool) -> jax.Array:
    """Multiply rows with the weights of their groups.

    Args:
        rows: ``[N, kernel positions * groups * C]``, or ``[N, groups * O]`` if across.
        matrices: ``[groups, O, kernel positions, C]``.
        across: Whether from ``O`` to ``C`` instead of the other way round.

    Returns:
        ``[N, groups * O]``, or ``[N, kernel positions * groups * C]`` if across.
    """
    groups, outputs, kernel, channels = matrices.shape
    if groups == 1:
        matrix = matrices.reshape(outputs, kernel * channels)
        return lax.dot_general(rows, matrix, (((1,), (0 if across else 1,)), ((), ())))
    if across:
        split = rows.reshape(-1, groups, outputs)
        return jnp.einsum("ngo,gokc->nkgc", split, matrices).reshape(-1, kernel * groups * channels)
    split = rows.reshape(-1, kernel, groups, channels)
    return jnp.einsum("nkgc,gokc->ngo", split, matrices).reshape(-1, groups * outputs)


class _Gathering(NamedTuple):
    """Which elements of images the windows cover.

    Attributes:
        shape: Of the images, ``[N, *sizes, C]``.
        windows: How they lie.
        counts: Number of windows along each axis.
    """

    shape: tuple[int, ...]
    windows: _Windows
    counts: tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _columns(images: jax.Array, gathering: _Gathering) -> jax.Array:
    """One row for each window, ``[N * windows, kernel positions * C]``.

    Looking rows of channels up is several times faster than joining shifted views; backward, adding shifted views up
    is faster than adding to looked-up places.
    """
    around = in_memory(_with_padding(images, gathering))
    count, *sizes, channels = around.shape
    places = np.zeros((1, 1), np.int32)
    for size, windows, kernel, stride, dilation in zip(
        sizes,
        gathering.counts,
        gathering.windows.kernel,
        gathering.windows.stride,
        gathering.windows.dilation,
        strict=True,
    ):
        own = np.arange(windows)[:, None] * stride + np.arange(kernel)[None, :] * dilation
        # Windows go on along the first axis, places within them along the second.
        spread = places[:, None, :, None] * size + own[None, :, None, :]
        places = spread.reshape(len(places) * windows, -1).astype(np.int32)
    flat = around.reshape(count, math.prod(sizes), channels)
    if not np.array_equal(places.reshape(-1), np.arange(flat.shape[1])):
        flat = flat.at[:, places.reshape(-1)].get(mode="promise_in_bounds")
    return flat.reshape(count * places.shape[0], places.shape[1] * channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _added_up(columns: jax.Array, gathering: _Gathering) -> jax.Array:
    """Images from columns, each element added where it was taken from: the transpose of `_columns`."""
    image = jax.ShapeDtypeStruct(gathering.shape, columns.dtype)
    (images,) = jax.linear_transpose(lambda given: _shifted_views(given, gathering), image)(columns)
    return in_memory(images)


_columns.defvjp(
    lambda images, gathering: (_columns(images, gathering), None),
    lambda gathering, _, gradient: (_added_up(gradient, gathering),),
)
_added_up.defvjp(
    lambda columns, gathering: (_added_up(columns, gathering), None),
    lambda gathering, _, gradient: (_columns(gradient, gathering),),
)


def _with_padding(images: jax.Array, gathering: _Gathering) -> jax.Array:
    """The part of the images, and zeros around them, that windows reach."""
    windows = gathering.windows
    for axis, (count, size, stride, padding, dilation) in enumerate(zip(gathering.counts, *windows, strict=True), 1):
        last = (count - 1) * stride + (size - 1) * dilation - padding
        images = padded(images, axis, padding, last + 1 - images.shape[axis])
    return images


def _shifted_views(images: jax.Array, gathering: _Gathering) -> jax.Array:
    """What `_columns` computes, in the form whose transpose is fast."""
    windows, counts = gathering.windows, gathering.counts
    around = _with_padding(images, gathering)
    shifted = []
    for position in itertools.product(*map(range, windows.kernel)):
        first = [index * dilation for index, dilation in zip(position, windows.dilation, strict=True)]
        end = [
            start + (count - 1) * stride + 1 for start, count, stride in zip(first, counts, windows.stride, strict=True)
        ]
        count, channels = around.shape[0], around.shape[-1]
        view = lax.slice(around, [0, *first, 0], [count, *end, channels], [1, *windows.stride, 1])
        shifted.append(view.reshape(count * math.prod(counts), channels))
    return jnp.concatenate(shifted, axis=1)


_FORMS: dict[tuple[str, bool], _Form] = {
    ("native", False): _native,
    ("native", True): _native_transposed,
    ("matmul", False): _matmul,
    ("matmul", True): _matmul_transposed,
}
