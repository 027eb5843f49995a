"""Rows looked up in a table, and bags of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from bridge.ops.bounds import from_start, or_alarm, read
from bridge.ops.registry import Operation, lowers

aten = torch.ops.aten

_SUM, _MEAN, _MAX = range(3)


@jax.custom_jvp
def _with_gradient_times(array: jax.Array, factor: jax.Array) -> jax.Array:
    """The array itself, whose gradient is multiplied by a factor."""
    return array


@_with_gradient_times.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    array, factor = primals
    return array, tangents[0] * factor


@lowers(aten.embedding.default)
def embedding(
    operation: Operation,
    weight: jax.Array,
    indices: jax.Array,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    """Look rows up. An index outside of the table, where PyTorch raises, gives a row of NaN."""
    return _rows(weight, indices, padding_idx, scale_grad_by_freq)


def _rows(weight: jax.Array, indices: jax.Array, padding_idx: int, scale_grad_by_freq: bool) -> jax.Array:
    rows = read(weight, from_start(indices, weight.shape[0]))
    if scale_grad_by_freq:
        count = jnp.zeros(weight.shape[0], weight.dtype).at[indices.reshape(-1)].add(1)
        rows = _with_gradient_times(rows, 1 / count[indices][..., None])
    if padding_idx >= 0:
        rows = jnp.where((indices == padding_idx)[..., None], lax.stop_gradient(rows), rows)
    return rows


@lowers(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def embedding_bag(
    operation: Operation,
    weight: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[jax.Array, ...]:
    """The sum, mean or largest entry of the rows of each bag; an empty bag gives zeros.

    A bag with an index outside of the table, and all of them if offsets do not start at 0 or go beyond the end, are
    NaN; PyTorch raises.

    Returns:
        The bags, and three arrays of which PyTorch promises only the shapes: the bag of each row, the sizes of the
        bags, and the index whose entry was the largest.
    """
    count = operation.shape[0]
    places = jnp.arange(indices.shape[0], dtype=offsets.dtype)
    bags = jnp.searchsorted(offsets[:count], places, side="right") - 1
    # What does not count goes to a bag that does not exist.
    if padding_idx >= 0:
        bags = jnp.where(indices == padding_idx, count, bags)
    sizes = jnp.zeros(count, jnp.int64).at[bags].add(1, mode="drop")
    rows = _rows(weight, indices, padding_idx, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    if mode == _MAX:
        output, largest = _largest(rows, bags, count, indices)
    else:
        output = jnp.zeros((count, rows.shape[1]), rows.dtype).at[bags].add(rows, mode="drop")
        largest = jnp.zeros(0, jnp.int64)
    if mode == _MEAN:
        output = output / jnp.maximum(sizes, 1).astype(output.dtype)[:, None]
    if offsets.shape[0]:
        output = or_alarm(output, (offsets[0] == 0) & (offsets[-1] <= indices.shape[0]))
    further = [
        jnp.resize(array, result.shape) if array.size else jnp.zeros(result.shape, jnp.int64)
        for array, result in zip((bags, sizes, largest), operation.result[1:], strict=True)
    ]
    return (output, *further)


def _largest(rows: jax.Array, bags: jax.Array, count: int, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest entries of each bag, the first of equal ones getting the gradient; and their indices."""
    total, features = rows.shape
    if total == 0:
        return jnp.zeros((count, features), rows.dtype), jnp.zeros((count, features), jnp.int64)
    fixed = lax.stop_gradient(rows)
    most = jnp.full((count, features), -jnp.inf, rows.dtype).at[bags].max(fixed, mode="drop")
    matches = (fixed == most.at[bags].get(mode="clip")) | jnp.isnan(fixed)
    place = jnp.where(matches, jnp.arange(total)[:, None], total)
    first = jnp.full((count, features), total).at[bags].min(place, mode="drop")
    found = jnp.take_along_axis(rows, jnp.minimum(first, total - 1), axis=0)
    empty = first == total
    return jnp.where(empty, jnp.zeros_like(found), found), jnp.where(empty, 0, indices[jnp.minimum(first, total - 1)])


@jax.custom_jvp
def _with_value(array: jax.Array, value: jax.Array) -> jax.Array:
    """Another value with the gradient of an array, as after a change in place that autograd does not see."""
    return value


@_with_value.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


@lowers(aten.embedding_renorm.default)
def embedding_renorm(
    operation: Operation, weight: jax.Array, indices: jax.Array, max_norm: float, norm_type: float
) -> jax.Array:
    """Shorten those looked-up rows of a table that are longer than allowed."""
    looked_up = jnp.zeros(weight.shape[0], bool).at[indices.reshape(-1)].set(True)
    fixed = lax.stop_gradient(weight)
    norms = jnp.linalg.norm(fixed, norm_type, axis=1)
    factors = jnp.where(looked_up & (norms > max_norm), max_norm / (norms + 1e-7), jnp.ones_like(norms))
    return _with_value(weight, fixed * factors[:, None])
