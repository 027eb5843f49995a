"""Images sampled at the points of a grid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch
from jax import lax

from bridge.ops.registry import Operation, lowers
from bridge.ops.resampling import cubic_weights

aten = torch.ops.aten

_LINEAR, _NEAREST, _CUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)


@lowers(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(
    operation: Operation,
    input: jax.Array,
    grid: jax.Array,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> jax.Array:
    """Values of ``input [N, C, *sizes]`` at ``grid [N, *points, axes]``, whose numbers go from -1 to 1."""
    axes = grid.shape[-1]
    sizes = input.shape[2:]
    # The last number of a point is for the first spatial axis.
    given = [
        _in_pixels(grid[..., axes - 1 - axis].reshape(grid.shape[0], -1), sizes[axis], align_corners)
        for axis in range(axes)
    ]
    sample = _Sampler(input, padding_mode, align_corners)
    if interpolation_mode == _CUBIC:
        values = _cubic(sample, given)
    else:
        places = [_padded(place, size, padding_mode, align_corners) for place, size in zip(given, sizes, strict=True)]
        values = _linear(sample, places) if interpolation_mode == _LINEAR else sample(list(map(jnp.round, places)))
    return values.reshape(*input.shape[:2], *grid.shape[1:-1])


def _in_pixels(places: jax.Array, size: int, align_corners: bool) -> jax.Array:
    return (places + 1) / 2 * (size - 1) if align_corners else ((places + 1) * size - 1) / 2


class _Sampler:
    """Looks up the values of an image at whole positions, one array of positions for each axis.

    Attributes:
        sizes: Of the spatial axes.
        padding_mode: What lies outside.
        align_corners: Whether reflection is at the centres of the outermost elements, not at their edges.
    """

    def __init__(self, input: jax.Array, padding_mode: int, align_corners: bool) -> None:
        self.sizes = input.shape[2:]
        self.padding_mode = padding_mode
        self.align_corners = align_corners
        self._flat = input.reshape(*input.shape[:2], -1)

    def __call__(self, places: Sequence[jax.Array]) -> jax.Array:
        """The values ``[N, C, points]``; 0 outside of the image."""
        inside = jnp.ones(places[0].shape, bool)
        index = jnp.zeros(places[0].shape, jnp.int32)
        for place, size in zip(map(lax.stop_gradient, places), self.sizes, strict=True):
            inside &= (place >= 0) & (place <= size - 1)
            index = index * size + jnp.clip(place, 0, size - 1).astype(jnp.int32)
        values = jnp.take_along_axis(self._flat, index[:, None, :], axis=2, mode="clip")
        return jnp.where(inside[:, None, :], values, jnp.zeros_like(values))


def _linear(sample: _Sampler, places: Sequence[jax.Array]) -> jax.Array:
    low = [lax.stop_gradient(jnp.floor(place)) for place in places]
    total: jax.Array | None = None
    for corner in itertools.product((0, 1), repeat=len(places)):
        weight = jnp.ones_like(places[0])
        for up, place, floor in zip(corner, places, low, strict=True):
            weight = weight * ((place - floor) if up else (floor + 1 - place))
        part = sample([floor + up for up, floor in zip(corner, low, strict=True)]) * weight[:, None, :]
        total = part if total is None else total + part
    assert total is not None
    return total


def _cubic(sample: _Sampler, places: Sequence[jax.Array]) -> jax.Array:
    low = [lax.stop_gradient(jnp.floor(place)) for place in places]
    weights = [cubic_weights(place - floor) for place, floor in zip(places, low, strict=True)]
    total: jax.Array | None = None
    for taps in itertools.product(range(4), repeat=len(places)):
        neighbours = [
            _padded(floor + tap - 1, size, sample.padding_mode, sample.align_corners)
            for floor, tap, size in zip(low, taps, sample.sizes, strict=True)
        ]
        weight = jnp.ones_like(places[0])
        for tap, own in zip(taps, weights, strict=True):
            weight = weight * own[tap]
        part = sample(neighbours) * weight[:, None, :]
        total = part if total is None else total + part
    assert total is not None
    return total


def _padded(place: jax.Array, size: int, padding_mode: int, align_corners: bool) -> jax.Array:
    """Positions outside of the image moved to where their values are taken from."""
    if padding_mode == _ZEROS:
        return place
    if padding_mode == _REFLECTION:
        place = _reflected(place, 0, size - 1) if align_corners else _reflected(place, -0.5, size - 0.5)
    # On the border already, PyTorch gives a position no gradient.
    inside = (place > 0) & (place < size - 1)
    return jnp.where(inside, place, lax.stop_gradient(jnp.clip(place, 0, size - 1)))


def _reflected(place: jax.Array, low: float, high: float) -> jax.Array:
    span = high - low
    if span <= 0:
        return jnp.zeros_like(place)
    distance = place - low
    distance = jnp.where(distance < 0, -distance, distance)
    turns = lax.stop_gradient(jnp.floor(distance / span))
    rest = distance - turns * span
    return jnp.where(turns % 2 == 0, rest + low, span - rest + low)
