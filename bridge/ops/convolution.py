"""Convolutions, as XLA's own operation or as one matrix multiplication.

Stacked over models with weights of their own, XLA's operation becomes a grouped convolution, whose backward on CPU is
tens of times slower than a batched matrix multiplication.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import torch
from jax import lax

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
    columns = _columns(_channels_first(input, groups), windows, sizes)
    matrix = jnp.moveaxis(weight.reshape(groups, -1, *weight.shape[1:]), 2, -1)
    output = matrix.reshape(groups, matrix.shape[1], -1) @ columns
    return output.reshape(weight.shape[0], input.shape[0], *sizes).swapaxes(0, 1)


def _matmul_transposed(
    input: jax.Array, weight: jax.Array, windows: _Windows, sizes: tuple[int, ...], groups: int
) -> jax.Array:
    """The products of all kernel positions, each added where it belongs: the transpose of gathering columns."""
    images = _channels_first(input, groups)
    matrix = jnp.moveaxis(weight.reshape(groups, -1, *weight.shape[1:]), 2, -1)
    columns = matrix.reshape(*matrix.shape[:2], -1).swapaxes(1, 2) @ images.reshape(*images.shape[:2], -1)
    image = jax.ShapeDtypeStruct((groups, weight.shape[1], input.shape[0], *sizes), columns.dtype)
    gather = lambda output: _columns(output, windows, input.shape[2:])  # noqa: E731  (named for the reader)
    (output,) = jax.linear_transpose(gather, image)(columns)
    return output.reshape(-1, input.shape[0], *sizes).swapaxes(0, 1)


def _channels_first(input: jax.Array, groups: int) -> jax.Array:
    """``[N, C, *sizes]`` as ``[groups, C/groups, N, *sizes]``: whole images stay contiguous."""
    swapped = input.swapaxes(0, 1)
    return swapped.reshape(groups, -1, *swapped.shape[1:])


def _columns(images: jax.Array, windows: _Windows, counts: Sequence[int]) -> jax.Array:
    """For each window one column with the elements that it covers.

    Args:
        images: ``[groups, channels, N, *sizes]``.
        windows: How they lie.
        counts: Number of windows along each axis.

    Returns:
        ``[groups, kernel positions * channels, N * windows]``.
    """
    for axis, (count, size, stride, padding, dilation) in enumerate(zip(counts, *windows, strict=True), 3):
        last = (count - 1) * stride + (size - 1) * dilation - padding
        images = padded(images, axis, padding, last + 1 - images.shape[axis])
    leading = images.shape[:3]
    shifted = []
    for position in itertools.product(*map(range, windows.kernel)):
        first = [index * dilation for index, dilation in zip(position, windows.dilation, strict=True)]
        end = [
            start + (count - 1) * stride + 1 for start, count, stride in zip(first, counts, windows.stride, strict=True)
        ]
        view = lax.slice(images, [0, 0, 0, *first], [*leading, *end], [1, 1, 1, *windows.stride])
        shifted.append(view.reshape(*leading[:2], leading[2] * math.prod(counts)))
    return jnp.concatenate(shifted, axis=1)


_FORMS: dict[tuple[str, bool], _Form] = {
    ("native", False): _native,
    ("native", True): _native_transposed,
    ("matmul", False): _matmul,
    ("matmul", True): _matmul_transposed,
}
