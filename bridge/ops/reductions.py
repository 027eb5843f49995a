"""Operations that combine, order or accumulate the elements along dimensions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array, lax

from bridge.ops.pointwise import absolute, cast
from bridge.ops.registry import Lowering, Operation, lowers

aten = torch.ops.aten

Dims = int | Sequence[int] | None


def axes(value: Array, dims: Dims) -> tuple[int, ...]:
    """The axes that a reduction runs over: all of them if none are named."""
    if isinstance(dims, int):
        dims = (dims,)
    if value.ndim == 0:
        return ()
    return tuple(dim % value.ndim for dim in dims) if dims else tuple(range(value.ndim))


def _reduces(function: Callable[..., Array]) -> Lowering:
    """A lowering that reduces in the dtype of its result."""

    def lowering(
        operation: Operation, value: Array, dims: Dims = None, keepdim: bool = False, *, dtype: Any = None
    ) -> Array:
        return function(value.astype(operation.dtype), axis=axes(value, dims), keepdims=keepdim)

    return lowering


def _of_dtype(function: Callable[..., Array]) -> Lowering:
    """A lowering of a reduction of a whole tensor, whose second argument is a dtype."""
    return lambda operation, value, dtype=None: function(value.astype(operation.dtype))


_REDUCTIONS: dict[Callable[..., Array], tuple[Any, ...]] = {
    jnp.sum: (aten.sum.dim_IntList,),
    jnp.nansum: (aten.nansum.default,),
    jnp.mean: (aten.mean.dim,),
    jnp.prod: (aten.prod.dim_int,),
    jnp.max: (aten.amax.default, aten.max.default),
    jnp.min: (aten.amin.default, aten.min.default),
    jnp.any: (aten.any.default, aten.any.dim, aten.any.dims),
    jnp.all: (aten.all.default, aten.all.dim, aten.all.dims),
}
for _function, _targets in _REDUCTIONS.items():
    lowers(*_targets)(_reduces(_function))
lowers(aten.sum.default)(_of_dtype(jnp.sum))
lowers(aten.mean.default)(_of_dtype(jnp.mean))
lowers(aten.prod.default)(_of_dtype(jnp.prod))


@lowers(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def _count_nonzero(operation: Operation, value: Array, dims: Dims = None) -> Array:
    return jnp.sum(value != 0, axis=axes(value, dims), dtype=jnp.int64)


@lowers(aten.aminmax.default)
def _aminmax(operation: Operation, value: Array, *, dim: int | None = None, keepdim: bool = False) -> tuple[Array, ...]:
    along = axes(value, dim)
    return jnp.min(value, axis=along, keepdims=keepdim), jnp.max(value, axis=along, keepdims=keepdim)


# Variances.


def _variance(value: Array, dims: Dims, correction: float | None, keepdim: bool) -> Array:
    along = axes(value, dims)
    count = math.prod(value.shape[axis] for axis in along)
    deviation = value - jnp.mean(value, axis=along, keepdims=True)
    squares = jnp.real(deviation * jnp.conj(deviation))
    freedom = max(count - (1 if correction is None else correction), 0)
    return jnp.sum(squares, axis=along, keepdims=keepdim) / freedom


def root(value: Array) -> Array:
    """The square root, whose slope at zero is zero."""
    return jnp.where(value == 0, 0, jnp.sqrt(jnp.where(value == 0, 1, value)))


@lowers(aten.var.correction)
def _var(
    operation: Operation, value: Array, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> Array:
    return _variance(value, dim, correction, keepdim)


@lowers(aten.std.correction)
def _std(
    operation: Operation, value: Array, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> Array:
    return root(_variance(value, dim, correction, keepdim))


@lowers(aten.var.default, aten.var.dim, aten.std.default, aten.std.dim)
def _unbiased(operation: Operation, value: Array, *args: Any, **options: Any) -> Array:
    names = (
        ("unbiased",) if operation.target in (aten.var.default, aten.std.default) else ("dim", "unbiased", "keepdim")
    )
    given = dict(zip(names, args, strict=False)) | options
    correction = 1 if given.get("unbiased", True) else 0
    variance = _variance(value, given.get("dim"), correction, given.get("keepdim", False))
    return root(variance) if operation.target in (aten.std.default, aten.std.dim) else variance


@lowers(aten.var_mean.correction, aten.std_mean.correction)
def _with_mean(
    operation: Operation, value: Array, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Array, Array]:
    variance = _variance(value, dim, correction, keepdim)
    mean = jnp.mean(value, axis=axes(value, dim), keepdims=keepdim)
    return (variance if operation.target is aten.var_mean.correction else root(variance)), mean


# Norms.


def vector_norm(value: Array, order: float, along: tuple[int, ...], keepdim: bool) -> Array:
    """The norm, whose slope at zero is zero."""
    if order == 0:
        real = jnp.abs(value).dtype
        return jnp.sum(value != 0, axis=along, keepdims=keepdim).astype(real)
    if order == 2:
        return root(jnp.sum(jnp.real(value * jnp.conj(value)), axis=along, keepdims=keepdim))
    size = absolute(value)
    if order == math.inf:
        return jnp.max(size, axis=along, keepdims=keepdim)
    if order == -math.inf:
        return jnp.min(size, axis=along, keepdims=keepdim)
    if order == 1:
        return jnp.sum(size, axis=along, keepdims=keepdim)
    # Below one the slope of a power is infinite at zero.
    powers = jnp.where(size == 0, 0.0**order if order > 0 else jnp.inf, jnp.where(size == 0, 1, size) ** order)
    total = jnp.sum(powers, axis=along, keepdims=keepdim)
    flat = (total == 0) | jnp.isinf(total)
    return jnp.where(flat, total if order > 0 else 1 / total, jnp.where(flat, 1, total) ** (1 / order))


@lowers(aten.linalg_vector_norm.default)
def _vector_norm(
    operation: Operation, value: Array, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Array:
    if dtype is not None:
        value = value.astype(jnp.result_type(operation.dtype, value.dtype))
    return vector_norm(value, ord, axes(value, dim), keepdim)


@lowers(aten.norm.Scalar, aten.norm.ScalarOpt_dim)
def _norm(operation: Operation, value: Array, p: float | None = 2, dim: Dims = None, keepdim: bool = False) -> Array:
    return vector_norm(value, 2 if p is None else p, axes(value, dim), keepdim)


@lowers(aten.dist.default)
def _dist(operation: Operation, left: Array, right: Array, p: float = 2) -> Array:
    difference = left - right
    return vector_norm(difference, p, axes(difference, None), False)


# One element along a dimension.


def _at_least_1d(value: Array) -> Array:
    return value.reshape(1) if value.ndim == 0 else value


def _picked(operation: Operation, value: Array, index: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """The elements at an index per row, and that index; no other element gets a gradient."""
    index = jnp.expand_dims(index, dim)
    picked = jnp.take_along_axis(_at_least_1d(value), index, axis=dim)
    return picked.reshape(operation.shape), index.reshape(operation.shape)


def _extreme(index_of: Callable[..., Array]) -> Lowering:
    def lowering(operation: Operation, value: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
        return _picked(operation, value, index_of(_at_least_1d(value), axis=dim), dim, keepdim)

    return lowering


lowers(aten.max.dim)(_extreme(jnp.argmax))
lowers(aten.min.dim)(_extreme(jnp.argmin))


def _arg(index_of: Callable[..., Array]) -> Lowering:
    def lowering(operation: Operation, value: Array, dim: int | None = None, keepdim: bool = False) -> Array:
        index = index_of(value.reshape(-1)) if dim is None else index_of(_at_least_1d(value), axis=dim)
        return index.reshape(operation.shape)

    return lowering


lowers(aten.argmax.default)(_arg(jnp.argmax))
lowers(aten.argmin.default)(_arg(jnp.argmin))


def _order(value: Array, dim: int, descending: bool = False) -> Array:
    return jnp.argsort(lax.stop_gradient(_at_least_1d(value)), axis=dim, stable=True, descending=descending)


def _middle(operation: Operation, value: Array, dim: int, keepdim: bool, skip_nan: bool) -> tuple[Array, Array]:
    value = _at_least_1d(value)
    order, count = _order(value, dim), value.shape[dim]
    is_nan = jnp.isnan(value)
    valid = count - jnp.sum(is_nan, axis=dim)
    # NaN is sorted last.
    place = (jnp.maximum(valid, 1) - 1) // 2 if skip_nan else jnp.where(valid < count, valid, (count - 1) // 2)
    index = jnp.take_along_axis(order, jnp.expand_dims(place, dim), axis=dim)
    return _picked(operation, value, jnp.squeeze(index, dim), dim, keepdim)


@lowers(aten.median.dim)
def _median(operation: Operation, value: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return _middle(operation, value, dim, keepdim, skip_nan=False)


@lowers(aten.nanmedian.dim)
def _nanmedian(operation: Operation, value: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return _middle(operation, value, dim, keepdim, skip_nan=True)


@lowers(aten.median.default)
def _median_of_all(operation: Operation, value: Array) -> Array:
    return _middle(operation, value.reshape(-1), 0, False, skip_nan=False)[0]


@lowers(aten.nanmedian.default)
def _nanmedian_of_all(operation: Operation, value: Array) -> Array:
    return _middle(operation, value.reshape(-1), 0, False, skip_nan=True)[0]


@lowers(aten.kthvalue.default)
def _kth(operation: Operation, value: Array, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    index = lax.index_in_dim(_order(value, dim), k - 1, axis=dim, keepdims=False)
    return _picked(operation, value, index, dim, keepdim)


@lowers(aten.mode.default)
def _mode(operation: Operation, value: Array, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    rows = jnp.moveaxis(lax.stop_gradient(_at_least_1d(value)), dim, -1)
    counts = jnp.sum(rows[..., :, None] == rows[..., None, :], axis=-1)
    # The smallest of the most frequent, and of these the last.
    most = counts == jnp.max(counts, axis=-1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(rows, axis=-1, stable=True), axis=-1, stable=True)
    smallest = jnp.take_along_axis(rows, jnp.argmin(jnp.where(most, rank, rows.shape[-1]), -1)[..., None], axis=-1)
    places = jnp.arange(rows.shape[-1])
    return _picked(operation, value, jnp.argmax(jnp.where(rows == smallest, places, -1), axis=-1), dim, keepdim)


@lowers(aten.histc.default)
def _histogram(operation: Operation, value: Array, bins: int = 100, min: float = 0, max: float = 0) -> Array:
    low, high = cast(value.dtype, min, max)
    if min == max:
        low, high = jnp.min(value), jnp.max(value)
    low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    place = jnp.clip(((value - low) / (high - low) * bins).astype(jnp.int64), 0, bins - 1)
    counted = (value >= low) & (value <= high)
    return jnp.zeros(bins, operation.dtype).at[place].add(counted.astype(operation.dtype))


# Orders.


def _in_order(operation: Operation, value: Array, order: Array, dim: int) -> tuple[Array, Array]:
    ordered = jnp.take_along_axis(_at_least_1d(value), order, axis=dim)
    return ordered.reshape(operation.shape), order.reshape(operation.shape)


@lowers(aten.sort.default)
def _sort(operation: Operation, value: Array, dim: int = -1, descending: bool = False) -> tuple[Array, Array]:
    return _in_order(operation, value, _order(value, dim, descending), dim)


@lowers(aten.sort.stable)
def _sort_stable(
    operation: Operation, value: Array, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Array, Array]:
    return _in_order(operation, value, _order(value, dim, descending), dim)


@lowers(aten.argsort.default)
def _argsort(operation: Operation, value: Array, dim: int = -1, descending: bool = False) -> Array:
    return _order(value, dim, descending).reshape(operation.shape)


@lowers(aten.argsort.stable)
def _argsort_stable(
    operation: Operation, value: Array, *, stable: bool, dim: int = -1, descending: bool = False
) -> Array:
    return _order(value, dim, descending).reshape(operation.shape)


@lowers(aten.topk.default)
def _topk(
    operation: Operation, value: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Array, Array]:
    order = lax.slice_in_dim(_order(value, dim, largest), 0, k, axis=dim)
    return _in_order(operation, value, order, dim)


@lowers(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def _searchsorted(
    operation: Operation,
    ordered: Array,
    value: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Array | None = None,
) -> Array:
    if sorter is not None:
        ordered = jnp.take_along_axis(ordered, sorter, axis=-1)
    side = side or ("right" if right else "left")
    value = jnp.asarray(value)
    search: Callable[[Array, Array], Array] = functools.partial(jnp.searchsorted, side=side)
    if ordered.ndim == 1:
        return search(ordered, value)
    rows = jax.vmap(search)(ordered.reshape(-1, ordered.shape[-1]), value.reshape(-1, value.shape[-1]))
    return rows.reshape(operation.shape)


@lowers(aten.bucketize.Tensor, aten.bucketize.Scalar)
def _bucketize(
    operation: Operation, value: Any, boundaries: Array, *, out_int32: bool = False, right: bool = False
) -> Array:
    return jnp.searchsorted(boundaries, jnp.asarray(value), side="right" if right else "left")


# Running totals.


def _cumulative(function: Callable[..., Array]) -> Lowering:
    def lowering(operation: Operation, value: Array, dim: int, *, dtype: Any = None) -> Array:
        value = value.astype(operation.dtype)
        return function(value, axis=dim % value.ndim) if value.ndim else value

    return lowering


lowers(aten.cumsum.default)(_cumulative(lax.cumsum))
lowers(aten.cumprod.default)(_cumulative(lax.cumprod))
lowers(aten.logcumsumexp.default)(_cumulative(lax.cumlogsumexp))


def _running_extreme(is_new: Callable[[Array, Array], Array]) -> Lowering:
    def lowering(operation: Operation, value: Array, dim: int) -> tuple[Array, Array]:
        rows = _at_least_1d(value)
        places = lax.broadcasted_iota(jnp.int64, rows.shape, dim % rows.ndim)

        def later(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
            new = is_new(left[0], right[0]) | jnp.isnan(right[0])
            return jnp.where(new, right[0], left[0]), jnp.where(new, right[1], left[1])

        _, index = lax.associative_scan(later, (lax.stop_gradient(rows), places), axis=dim % rows.ndim)
        return _in_order(operation, value, index, dim)

    return lowering


lowers(aten.cummax.default)(_running_extreme(jnp.less_equal))
lowers(aten.cummin.default)(_running_extreme(jnp.greater_equal))


__all__ = ["axes", "root", "vector_norm"]
