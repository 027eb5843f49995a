"""Images of other sizes, and images cut into patches and put together again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

from bridge.ops.registry import Operation, lowers
from bridge.ops.windows import per_axis, positions, views

aten = torch.ops.aten

_Matrix = NDArray[np.float64]
_Axis = Callable[[int, int, bool, float | None], _Matrix]
"""From sizes before and after, ``align_corners`` and a given scale: the weights ``[after, before]``."""


def _nearest(operation: Operation, input: jax.Array, scales: Sequence[float | None], offset: float) -> jax.Array:
    first = input.ndim - len(scales)
    for axis, scale in enumerate(scales, first):
        before, after = input.shape[axis], operation.shape[axis]
        if after % before == 0 and (scale is None or scale == after // before):
            input = jnp.repeat(input, after // before, axis)
            continue
        # In float32, as PyTorch decides which element is the nearest.
        step = np.float32(1 / scale) if scale else np.float32(before) / np.float32(after)
        places = np.floor((np.arange(after, dtype=np.float32) + np.float32(offset)) * step)
        input = jnp.take(input, np.minimum(places.astype(np.int64), before - 1), axis, mode="clip")
    return input


@lowers(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default)
def upsample_nearest(
    operation: Operation, input: jax.Array, output_size: Sequence[int], *scales: float | None
) -> jax.Array:
    """Each element is that of the input at the rounded down place."""
    return _nearest(operation, input, _all(scales, output_size), 0.0)


@lowers(
    aten._upsample_nearest_exact1d.default,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact3d.default,
)
def upsample_nearest_exact(
    operation: Operation, input: jax.Array, output_size: Sequence[int], *scales: float | None
) -> jax.Array:
    """Each element is that of the input whose centre is the nearest."""
    return _nearest(operation, input, _all(scales, output_size), 0.5)


def _all(scales: Sequence[float | None], output_size: Sequence[int]) -> list[float | None]:
    """A scale for each axis; trailing ones may be left out of a recorded call."""
    return [*scales, *[None] * (len(output_size) - len(scales))]


def _scale(before: int, after: int, align_corners: bool, scale: float | None) -> float:
    """Elements of the input per element of the output."""
    if align_corners:
        return (before - 1) / (after - 1) if after > 1 else 0.0
    return 1 / scale if scale is not None and scale > 0 else before / after


def _sources(before: int, after: int, align_corners: bool, scale: float | None) -> NDArray[np.float64]:
    """Where in the input each element of the output lies."""
    step = _scale(before, after, align_corners, scale)
    places = np.arange(after, dtype=np.float64)
    return places * step if align_corners else (places + 0.5) * step - 0.5


def _gathered(before: int, taps: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> _Matrix:
    """Weights from, for each neighbour, its place and its weight."""
    matrix = np.zeros((len(taps[0][0]), before))
    for places, weights in taps:
        np.add.at(matrix, (np.arange(len(places)), np.clip(places, 0, before - 1)), weights)
    return matrix


def _linear(before: int, after: int, align_corners: bool, scale: float | None) -> _Matrix:
    sources = np.maximum(_sources(before, after, align_corners, scale), 0)
    low = np.minimum(np.floor(sources).astype(np.int64), before - 1)
    share = np.clip(sources - low, 0, 1)
    return _gathered(before, [(low, 1 - share), (low + 1, share)])


def cubic_weights(share: Any) -> tuple[Any, Any, Any, Any]:
    """Weights of the four neighbours of a point that lies ``share`` behind the second of them."""
    a = -0.75

    def near(x: Any) -> Any:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Any) -> Any:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return far(share + 1), near(share), near(1 - share), far(2 - share)


def _cubic(before: int, after: int, align_corners: bool, scale: float | None) -> _Matrix:
    sources = _sources(before, after, align_corners, scale)
    low = np.floor(sources).astype(np.int64)
    return _gathered(before, [(low + tap - 1, weights) for tap, weights in enumerate(cubic_weights(sources - low))])


def _smoothed(kernel: Callable[[float], float], width: int) -> _Axis:
    """Weights of all elements that an element of the output covers: what ``antialias`` asks for."""

    def axis(before: int, after: int, align_corners: bool, scale: float | None) -> _Matrix:
        step = _scale(before, after, align_corners, scale)
        stretch = max(step, 1.0)
        matrix = np.zeros((after, before))
        for place in range(after):
            centre, reach = step * (place + 0.5), width / 2 * stretch
            first, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), before)
            for other in range(first, end):
                matrix[place, other] = kernel((other - centre + 0.5) / stretch)
        return matrix / matrix.sum(1, keepdims=True)

    return axis


def _triangle(x: float) -> float:
    return max(1 - abs(x), 0.0)


def _smooth_cubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos(x: float) -> float:
    return float(np.sinc(x) * np.sinc(x / 3)) if abs(x) < 3 else 0.0


def _resampled(weights: _Axis) -> Callable[..., jax.Array]:
    def lowering(
        operation: Operation,
        input: jax.Array,
        output_size: Sequence[int],
        align_corners: bool,
        *scales: float | None,
    ) -> jax.Array:
        """One product with a matrix of weights for each axis: fast backward too."""
        first = input.ndim - len(output_size)
        for axis, scale in enumerate(_all(scales, output_size), first):
            matrix = weights(input.shape[axis], operation.shape[axis], align_corners, scale).astype(input.dtype)
            input = jnp.moveaxis(jnp.tensordot(input, matrix, (axis, 1)), -1, axis)
        return input

    return lowering


lowers(aten.upsample_linear1d.default, aten.upsample_bilinear2d.default, aten.upsample_trilinear3d.default)(
    _resampled(_linear)
)
lowers(aten.upsample_bicubic2d.default)(_resampled(_cubic))
lowers(aten._upsample_bilinear2d_aa.default)(_resampled(_smoothed(_triangle, 2)))
lowers(aten._upsample_bicubic2d_aa.default)(_resampled(_smoothed(_smooth_cubic, 4)))
if hasattr(aten, "_upsample_lanczos2d_aa"):
    lowers(aten._upsample_lanczos2d_aa.default)(_resampled(_smoothed(_lanczos, 6)))


@lowers(aten.im2col.default)
def im2col(
    operation: Operation,
    input: jax.Array,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> jax.Array:
    """Cut an image into overlapping patches, one column each."""
    return _patches(input, *(per_axis(numbers, 2) for numbers in (kernel_size, dilation, padding, stride)))


@lowers(aten.col2im.default)
def col2im(
    operation: Operation,
    input: jax.Array,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> jax.Array:
    """Add patches up to an image: the transpose of cutting it into patches."""
    settings = [per_axis(numbers, 2) for numbers in (kernel_size, dilation, padding, stride)]
    image = jax.ShapeDtypeStruct(operation.shape, input.dtype)
    (output,) = jax.linear_transpose(lambda given: _patches(given, *settings), image)(input)
    return output


def _patches(
    input: jax.Array, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> jax.Array:
    looked_at = []
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        count = (input.shape[axis - 2] + 2 * padding[axis] - reach) // stride[axis] + 1
        looked_at.append(positions(kernel[axis], count, stride[axis], padding[axis], dilation[axis]))
    shifted = [
        view
        for rows in views(input, input.ndim - 2, looked_at[0])
        for view in views(rows, input.ndim - 1, looked_at[1])
    ]
    stacked = jnp.stack(shifted, -3)
    return stacked.reshape(*input.shape[:-3], input.shape[-3] * math.prod(kernel), math.prod(stacked.shape[-2:]))
