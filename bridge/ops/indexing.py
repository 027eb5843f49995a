"""Operations that read and write elements at indices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array, lax

from bridge.ops.bounds import from_start, is_inside, or_alarm, read, read_along
from bridge.ops.pointwise import as_array, with_slope_of
from bridge.ops.registry import Operation, lowers
from mb_torch.errors import Unsupported

aten = torch.ops.aten

Index = Sequence[Array | None]


def _at_least_1d(value: Array) -> Array:
    return value.reshape(1) if value.ndim == 0 else value


def changed(value: Array, places: Any, source: Array, how: str) -> Array:
    """The value with elements at some places set, added to, and so on, by the name of a method of ``at[]``.

    Of elements that are set twice each gets the gradient of the place, as in PyTorch. A place outside counts as the
    nearest one inside, so that what is written there (`or_alarm`) is seen.
    """
    if how != "set" or not jnp.issubdtype(value.dtype, jnp.inexact):
        result: Array = getattr(value.at[places], how)(source, mode="clip")
        return result
    kept = jnp.ones(value.shape, jnp.bool_).at[places].set(False, mode="clip")
    written = lax.stop_gradient(value).at[places].set(lax.stop_gradient(source), mode="clip")
    return with_slope_of(written, jnp.where(kept, value, 0).at[places].add(source, mode="clip"))


# Whole rows, by lists of indices.


def _subscript(indices: Index) -> tuple[Any, ...]:
    return tuple(slice(None) if index is None else index for index in indices)


@lowers(aten.index.Tensor)
def _index(operation: Operation, value: Array, indices: Index) -> Array:
    if any(index is not None and index.dtype in (jnp.bool_, jnp.uint8) for index in indices):
        raise Unsupported(
            "the number of elements that a mask selects depends on values",
            fix="Use torch.where or multiply by the mask.",
        )
    return read(value, _subscript(indices))


@lowers(aten._unsafe_index.Tensor)
def _index_inside(operation: Operation, value: Array, indices: Index) -> Array:
    """Decompositions know that their positions are inside, so nothing is checked."""
    return value[_subscript(indices)]


@lowers(aten._unsafe_masked_index.default)
def _masked_index(operation: Operation, value: Array, mask: Array, indices: Index, filling: Any) -> Array:
    sizes = [size for index, size in zip(indices, value.shape, strict=False) if index is not None]
    own = [index for index in indices if index is not None]
    inside = iter([jnp.clip(index, 0, size - 1) for index, size in zip(own, sizes, strict=True)])
    read = value[_subscript([None if index is None else next(inside) for index in indices])]
    return jnp.where(mask, read, jnp.asarray(filling, value.dtype))


@lowers(aten._unsafe_masked_index_put_accumulate.default)
def _masked_index_put(operation: Operation, value: Array, mask: Array, indices: Index, values: Array) -> Array:
    own = [
        None if index is None else jnp.clip(index, -size, size - 1)
        for index, size in zip(indices, value.shape, strict=False)
    ]
    return value.at[_subscript(own)].add(jnp.where(mask, values, 0))


@lowers(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(operation: Operation, value: Array, indices: Index, values: Array, accumulate: bool = False) -> Array:
    values = values.astype(value.dtype)
    masks = [position for position, index in enumerate(indices) if index is not None and index.dtype == jnp.bool_]
    if masks:
        if any(index is not None for position, index in enumerate(indices) if position not in masks) or len(masks) > 1:
            raise Unsupported(
                "a mask is combined with other indices, and how many elements it selects depends on values",
                fix="Use torch.where.",
            )
        return _put_where(value, indices[masks[0]], masks[0], values, accumulate)
    inside = [
        jnp.all(is_inside(index, size, from_end=True))
        for index, size in zip(indices, value.shape, strict=False)
        if index is not None
    ]
    values = or_alarm(values, functools.reduce(jnp.logical_and, inside, jnp.asarray(True)))
    return changed(value, _subscript(indices), values, "add" if accumulate else "set")


def _put_where(value: Array, mask: Array | None, start: int, values: Array, accumulate: bool) -> Array:
    """Write where a mask over the dimensions from ``start`` on is true."""
    assert mask is not None
    rest = value.shape[start + mask.ndim :]
    # The selected elements are one dimension of the values.
    own = values.shape[max(values.ndim - len(rest) - 1, 0)] if values.ndim > len(rest) else 1
    if own == 1:
        if values.ndim > len(rest):
            values = values.reshape(
                *values.shape[: values.ndim - len(rest) - 1], *[1] * mask.ndim, *values.shape[values.ndim - len(rest) :]
            )
    else:
        # PyTorch raises unless the mask selects as many elements as there are values.
        rank = jnp.cumsum(mask.reshape(-1))
        rank = jnp.where(rank[-1:] == own, rank - 1, own).reshape(mask.shape)
        values = read(values, (*[slice(None)] * (values.ndim - len(rest) - 1), rank))
    chosen = mask.reshape(*mask.shape, *[1] * len(rest))
    return jnp.where(chosen, value + values if accumulate else values, value)


@lowers(aten.index_select.default)
def _index_select(operation: Operation, value: Array, dim: int, index: Array) -> Array:
    rows = _at_least_1d(value)
    dim %= rows.ndim
    index = from_start(_at_least_1d(index), rows.shape[dim])
    return read(rows, (*[slice(None)] * dim, index)).reshape(operation.shape)


def _rows_changed(value: Array, dim: int, index: Array, source: Array, how: str) -> Array:
    """The value with whole rows along a dimension set or added to. Negative rows count from the end."""
    rows = _at_least_1d(value)
    places = (*[slice(None)] * (dim % rows.ndim), _at_least_1d(index))
    return changed(rows, places, source, how).reshape(value.shape)


def _if_inside(source: Array, value: Array, dim: int, index: Array, *, from_end: bool = False) -> Array:
    """What is written to rows along a dimension, or the alarm if any of them does not exist."""
    size = value.shape[dim] if value.ndim else 1
    return or_alarm(source, jnp.all(is_inside(index, size, from_end=from_end)))


@lowers(aten.index_add.default)
def _index_add(operation: Operation, value: Array, dim: int, index: Array, source: Array, *, alpha: Any = 1) -> Array:
    added = source if alpha == 1 else source * jnp.asarray(alpha, value.dtype)
    return _rows_changed(value, dim, index, _if_inside(_at_least_1d(added), value, dim, index), "add")


@lowers(aten.index_copy.default)
def _index_copy(operation: Operation, value: Array, dim: int, index: Array, source: Array) -> Array:
    return _rows_changed(value, dim, index, _if_inside(_at_least_1d(source), value, dim, index), "set")


@lowers(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def _index_fill(operation: Operation, value: Array, dim: int, index: Array, filling: Any) -> Array:
    kept = _rows_changed(jnp.ones(value.shape, jnp.bool_), dim, index, jnp.asarray(False), "set")
    filling = _if_inside(as_array(filling, value.dtype), value, dim, index, from_end=True)
    return jnp.where(kept, value, filling)


@lowers(aten.index_reduce.default)
def _index_reduce(
    operation: Operation,
    value: Array,
    dim: int,
    index: Array,
    source: Array,
    reduce: str,
    *,
    include_self: bool = True,
) -> Array:
    rows, source = _at_least_1d(value), _at_least_1d(source)
    dim %= rows.ndim
    spread = jnp.broadcast_to(
        _at_least_1d(index).reshape([-1 if axis == dim else 1 for axis in range(rows.ndim)]), source.shape
    )
    return _scatter_reduce(operation, rows, dim, spread, source, reduce, include_self=include_self).reshape(value.shape)


# Single elements along one dimension.


def _cropped(value: Array, like: Array, dim: int | None = None) -> Array:
    """The leading block that an index covers; along ``dim`` everything."""
    limits = [
        own if axis == dim else min(own, other)
        for axis, (own, other) in enumerate(zip(value.shape, like.shape, strict=True))
    ]
    return lax.slice(value, [0] * value.ndim, limits)


@lowers(aten.gather.default)
def _gather(operation: Operation, value: Array, dim: int, index: Array, *, sparse_grad: bool = False) -> Array:
    if index.size == 0:
        return jnp.zeros(index.shape, value.dtype)
    value, index = _at_least_1d(value), _at_least_1d(index)
    dim %= value.ndim
    return read_along(_cropped(value, index, dim), index, dim).reshape(operation.shape)


@lowers(aten.take_along_dim.default)
def _take_along(operation: Operation, value: Array, index: Array, dim: int | None = None) -> Array:
    return jnp.take_along_axis(value, index, axis=dim)


def _places(index: Array, dim: int) -> tuple[Array, ...]:
    return tuple(
        index if axis == dim % index.ndim else lax.broadcasted_iota(index.dtype, index.shape, axis)
        for axis in range(index.ndim)
    )


def _scattered(value: Array, dim: int, index: Array, source: Any, how: str) -> Array:
    """The value with elements set, added, and so on, at an index along one dimension."""
    if index.size == 0:
        return value
    rows, index = _at_least_1d(value), _at_least_1d(index)
    source = as_array(source, value.dtype)
    if source.ndim:
        source = _cropped(source, index)
    elif index.shape:
        source = jnp.broadcast_to(source, index.shape)
    return changed(rows, _places(index, dim), source, how).reshape(value.shape)


def _checked(source: Any, value: Array, dim: int, index: Array) -> Array:
    """What is scattered along a dimension, or the alarm.

    Lines along the dimension have nothing to do with each other, so a place outside spoils its own line only.
    """
    source, index = as_array(source, value.dtype), _at_least_1d(index)
    if index.size == 0:
        return source
    if source.ndim:
        source = _cropped(source, index)
    size = value.shape[dim] if value.ndim else 1
    return or_alarm(source, jnp.all(is_inside(index, size), axis=dim, keepdims=True))


@lowers(aten.scatter.src, aten.scatter.value)
def _scatter(operation: Operation, value: Array, dim: int, index: Array, source: Any) -> Array:
    return _scattered(value, dim, index, _checked(source, value, dim, index), "set")


@lowers(aten.scatter_add.default)
def _scatter_add(operation: Operation, value: Array, dim: int, index: Array, source: Array) -> Array:
    return _scattered(value, dim, index, _checked(source, value, dim, index), "add")


@lowers(aten.scatter.reduce, aten.scatter.value_reduce)
def _scatter_with(operation: Operation, value: Array, dim: int, index: Array, source: Any, *, reduce: str) -> Array:
    source = _checked(source, value, dim, index)
    return _scattered(value, dim, index, source, {"add": "add", "multiply": "multiply"}[reduce])


@lowers(aten.scatter_reduce.two)
def _scatter_reduce(
    operation: Operation,
    value: Array,
    dim: int,
    index: Array,
    source: Array,
    reduce: str,
    *,
    include_self: bool = True,
) -> Array:
    if index.size == 0:
        return value
    shape = value.shape
    value, index, source = _at_least_1d(value), _at_least_1d(index), _at_least_1d(source)
    source = _checked(source, value, dim, index)
    counts = _scattered(jnp.zeros(value.shape, jnp.int64), dim, index, 1, "add")
    if not include_self:
        neutral = _neutral(reduce, value.dtype)
        kept, value = jnp.where(counts > 0, 0, value), jnp.where(counts > 0, neutral, value)
    if reduce in ("sum", "mean"):
        result = _scattered(value, dim, index, source, "add")
        if reduce == "mean":
            result = _mean_of(result, jnp.maximum(counts + (1 if include_self else 0), 1))
    elif reduce == "prod":
        result = _product(value, dim, index, source)
    else:
        result = _extreme(value, dim, index, source, {"amax": "max", "amin": "min"}[reduce])
    if not include_self:
        result = jnp.where(counts > 0, result, kept)
    return result.reshape(shape)


def _neutral(reduce: str, dtype: jnp.dtype) -> Any:
    if reduce in ("sum", "mean"):
        return 0
    if reduce in ("prod", "multiply"):
        return 1
    if jnp.issubdtype(dtype, jnp.floating):
        return -jnp.inf if reduce == "amax" else jnp.inf
    if dtype == jnp.bool_:
        return reduce == "amin"
    return np.iinfo(dtype).min if reduce == "amax" else np.iinfo(dtype).max


def _mean_of(total: Array, counts: Array) -> Array:
    if jnp.issubdtype(total.dtype, jnp.integer):
        return jnp.floor_divide(total, counts.astype(total.dtype))
    return total / counts.astype(total.dtype)


def _read(value: Array, dim: int, index: Array) -> Array:
    return jnp.take_along_axis(_cropped(value, index, dim % value.ndim), index, axis=dim)


def _extreme(value: Array, dim: int, index: Array, source: Array, how: str) -> Array:
    """The largest or smallest element per place; all that reach it share the gradient."""
    found = _scattered(lax.stop_gradient(value), dim, index, lax.stop_gradient(source), how)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return found
    own = (value == found).astype(value.dtype)
    others = (source == _read(found, dim, index)).astype(value.dtype)
    reached = jnp.maximum(_scattered(own, dim, index, others, "add"), 1)
    shares = _scattered(own * _finite(value), dim, index, others * _finite(source), "add") / reached
    return with_slope_of(found, shares)


def _finite(value: Array) -> Array:
    return jnp.where(jnp.isfinite(value), value, lax.stop_gradient(jnp.zeros_like(value)))


def _product(value: Array, dim: int, index: Array, source: Array) -> Array:
    """The product per place; where one factor is zero it alone gets a gradient."""
    fixed, factors = lax.stop_gradient(value), lax.stop_gradient(source)
    found = _scattered(fixed, dim, index, factors, "multiply")
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return found
    is_zero = factors == 0
    zeros = _read(
        _scattered(jnp.zeros(value.shape, jnp.int64), dim, index, is_zero.astype(jnp.int64), "add"), dim, index
    )
    alone = is_zero & (zeros == 1)
    without = _scattered(fixed, dim, index, jnp.where(alone, 1, factors), "multiply")
    of_source = jnp.where(alone, _read(without, dim, index), _read(found, dim, index) / jnp.where(is_zero, 1, factors))
    of_value = _scattered(jnp.ones_like(fixed), dim, index, factors, "multiply")
    return with_slope_of(found, _scattered(value * of_value, dim, index, source * of_source, "add"))


@lowers(aten.nonzero_static.default)
def _nonzero(operation: Operation, value: Array, *, size: int, fill_value: int = -1) -> Array:
    if value.ndim == 0:
        return jnp.zeros(operation.shape, jnp.int64)
    return jnp.stack(jnp.nonzero(value, size=size, fill_value=fill_value), axis=-1)


# By mask, and by index into all elements.


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(operation: Operation, value: Array, mask: Array, filling: Any) -> Array:
    return jnp.where(mask, as_array(filling, value.dtype), value)


@lowers(aten.masked_scatter.default)
def _masked_scatter(operation: Operation, value: Array, mask: Array, source: Array) -> Array:
    value, mask = jnp.broadcast_arrays(value, mask)
    if value.size == 0 or source.size == 0:
        return value
    # Where the mask selects more elements than there are, PyTorch raises.
    rank = jnp.cumsum(mask.reshape(-1)) - 1
    return jnp.where(mask, read(source.reshape(-1), rank).reshape(mask.shape), value)


@lowers(aten.take.default)
def _take(operation: Operation, value: Array, index: Array) -> Array:
    return read(value.reshape(-1), index)


@lowers(aten.put.default)
def _put(operation: Operation, value: Array, index: Array, source: Array, accumulate: bool = False) -> Array:
    how = "add" if accumulate else "set"
    source = or_alarm(source, jnp.all(is_inside(index, value.size, from_end=True)))
    return changed(value.reshape(-1), index.reshape(-1), source.reshape(-1), how).reshape(value.shape)


__all__ = ["changed"]
