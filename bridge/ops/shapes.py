"""Operations that create, copy and rearrange tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array, lax

from bridge.dtypes import as_jax_dtype
from bridge.ops.pointwise import as_array
from bridge.ops.registry import Operation, lowers

aten = torch.ops.aten

# Copies.


@lowers(
    aten.clone.default,
    aten.alias.default,
    aten.alias_copy.default,
    aten.contiguous.default,
    aten.lift.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
def _same(operation: Operation, value: Array, **options: Any) -> Array:
    return value


@lowers(aten.detach.default, aten.detach_copy.default)
def _detach(operation: Operation, value: Array) -> Array:
    return lax.stop_gradient(value)


@lowers(aten.copy.default)
def _copy(operation: Operation, value: Array, source: Array, non_blocking: bool = False) -> Array:
    return jnp.broadcast_to(source, operation.shape).astype(operation.dtype)


@lowers(aten.fill.Scalar, aten.fill.Tensor)
def _fill(operation: Operation, value: Array, filling: Any) -> Array:
    return jnp.broadcast_to(as_array(filling, operation.dtype), operation.shape)


# New tensors.


@lowers(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(operation: Operation, like: Any, filling: Any, *rest: Any, **options: Any) -> Array:
    if operation.target is aten.new_full.default:
        filling = rest[0]
    return jnp.full(operation.shape, filling, operation.dtype)


@lowers(aten.scalar_tensor.default)
def _scalar_tensor(operation: Operation, value: Any, **options: Any) -> Array:
    return jnp.asarray(value, operation.dtype)


@lowers(
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_zeros.default,
    aten.zeros.default,
    aten.zeros_like.default,
)
def _zeros(operation: Operation, *args: Any, **options: Any) -> Array:
    return jnp.zeros(operation.shape, operation.dtype)


@lowers(aten.new_ones.default, aten.ones.default, aten.ones_like.default)
def _ones(operation: Operation, *args: Any, **options: Any) -> Array:
    return jnp.ones(operation.shape, operation.dtype)


@lowers(aten.eye.default, aten.eye.m)
def _eye(operation: Operation, *args: Any, **options: Any) -> Array:
    rows, columns = operation.shape
    return jnp.eye(rows, columns, dtype=operation.dtype)


@lowers(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(operation: Operation, *bounds: Any, **options: Any) -> Array:
    start, _, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1) if len(bounds) == 2 else bounds
    # PyTorch counts in the widest type of the kind and rounds once.
    wide = jnp.int64 if jnp.issubdtype(operation.dtype, jnp.integer) else jnp.float64
    steps = jnp.arange(operation.shape[0], dtype=wide)
    return (steps * jnp.asarray(step, wide) + jnp.asarray(start, wide)).astype(operation.dtype)


@lowers(aten.linspace.default)
def _linspace(operation: Operation, start: float, end: float, steps: int, **options: Any) -> Array:
    (count,) = operation.shape
    whole = jnp.issubdtype(operation.dtype, jnp.integer)
    step = (end - start) / max(count - 1, 1)
    index = np.arange(count)
    values = np.where(index < count // 2 or count == 1, start + step * index, end - step * (count - 1 - index))
    return jnp.asarray(np.trunc(values) if whole else values, operation.dtype)


# Views, which are copies here, and their writing counterparts.


@lowers(
    aten._reshape_copy.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze_copy.default,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.dims,
    aten.unsqueeze.default,
    aten.unsqueeze_copy.default,
    aten.view.default,
    aten.view_copy.default,
)
def _reshape(operation: Operation, value: Array, *args: Any, **options: Any) -> Array:
    return value.reshape(operation.shape)


@lowers(aten.view.dtype, aten.view_copy.dtype)
def _reinterpret(operation: Operation, value: Array, dtype: torch.dtype) -> Array:
    source, target = value.dtype.itemsize, operation.dtype.itemsize
    if target > source:
        value = value.reshape(*value.shape[:-1], -1, target // source)
    return lax.bitcast_convert_type(value, as_jax_dtype(dtype)).reshape(operation.shape)


@lowers(aten.view_as_real.default, aten.view_as_real_copy.default)
def _view_as_real(operation: Operation, value: Array) -> Array:
    return jnp.stack([value.real, value.imag], axis=-1)


@lowers(aten.view_as_complex.default, aten.view_as_complex_copy.default)
def _view_as_complex(operation: Operation, value: Array) -> Array:
    return lax.complex(value[..., 0], value[..., 1])


@lowers(aten.expand.default, aten.expand_copy.default)
def _expand(operation: Operation, value: Array, *args: Any, **options: Any) -> Array:
    return jnp.broadcast_to(value, operation.shape)


@lowers(aten.permute.default, aten.permute_copy.default)
def _permute(operation: Operation, value: Array, dims: Sequence[int]) -> Array:
    return jnp.transpose(value, dims)


@lowers(aten.transpose.int, aten.transpose_copy.int)
def _transpose(operation: Operation, value: Array, first: int, second: int) -> Array:
    return jnp.swapaxes(value, first, second) if value.ndim else value


@lowers(aten.t.default, aten.t_copy.default)
def _t(operation: Operation, value: Array) -> Array:
    return value.T


def _bounds(size: int, start: int | None, end: int | None, step: int) -> tuple[int, int, int]:
    first, last, _ = slice(start, end, step).indices(size)
    return first, max(first, last), step


@lowers(aten.slice.Tensor, aten.slice_copy.Tensor)
def _slice(
    operation: Operation, value: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    return lax.slice_in_dim(value, *_bounds(value.shape[dim], start, end, step), axis=dim)


@lowers(aten.narrow_copy.default)
def _narrow(operation: Operation, value: Array, dim: int, start: int, length: int) -> Array:
    start %= max(value.shape[dim], 1)
    return lax.slice_in_dim(value, start, start + length, axis=dim)


def written(value: Array, source: Array, dim: int, start: int) -> Array:
    """The value with a block of it replaced."""
    source = source.astype(value.dtype)
    return source if source.shape == value.shape else lax.dynamic_update_slice_in_dim(value, source, start, axis=dim)


@lowers(aten.slice_scatter.default)
def _slice_scatter(
    operation: Operation,
    value: Array,
    source: Array,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Array:
    start, end, step = _bounds(value.shape[dim], start, end, step)
    count = len(range(start, end, step))
    source = jnp.broadcast_to(
        source, tuple(count if axis == dim % value.ndim else size for axis, size in enumerate(value.shape))
    )
    if step == 1:
        return written(value, source, dim, start)
    moved = jnp.moveaxis(value, dim, 0).at[start:end:step].set(jnp.moveaxis(source, dim, 0).astype(value.dtype))
    return jnp.moveaxis(moved, 0, dim)


@lowers(aten.select.int, aten.select_copy.int)
def _select(operation: Operation, value: Array, dim: int, index: int) -> Array:
    return lax.index_in_dim(value, index, axis=dim, keepdims=False)


@lowers(aten.select_scatter.default)
def _select_scatter(operation: Operation, value: Array, source: Array, dim: int, index: int) -> Array:
    place: int = index % value.shape[dim]
    return written(value, jnp.expand_dims(source, dim), dim, place)


@lowers(aten.diagonal.default, aten.diagonal_copy.default)
def _diagonal(operation: Operation, value: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    diagonal: Array = jnp.diagonal(value, offset, dim1, dim2)
    return diagonal


@lowers(aten.diagonal_scatter.default)
def _diagonal_scatter(
    operation: Operation, value: Array, source: Array, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Array:
    moved = jnp.moveaxis(value, (dim1, dim2), (-2, -1))
    index = np.arange(source.shape[-1])
    moved = moved.at[..., index + max(-offset, 0), index + max(offset, 0)].set(source.astype(value.dtype))
    return jnp.moveaxis(moved, (-2, -1), (dim1, dim2))


@lowers(aten.unfold.default, aten.unfold_copy.default)
def _unfold(operation: Operation, value: Array, dim: int, size: int, step: int) -> Array:
    if value.ndim == 0:
        return value.reshape(operation.shape)
    dim %= value.ndim
    windows = np.arange(operation.shape[dim])[:, None] * step + np.arange(size)
    return jnp.moveaxis(jnp.take(value, windows, axis=dim), dim + 1, -1)


@lowers(aten.split.Tensor, aten.split_copy.Tensor, aten.split_with_sizes.default, aten.split_with_sizes_copy.default)
def _split(operation: Operation, value: Array, sizes: Any, dim: int = 0) -> tuple[Array, ...]:
    pieces, start = [], 0
    for piece in operation.result:
        end = start + piece.shape[dim]
        pieces.append(lax.slice_in_dim(value, start, end, axis=dim))
        start = end
    return tuple(pieces)


@lowers(aten.unbind.int, aten.unbind_copy.int)
def _unbind(operation: Operation, value: Array, dim: int = 0) -> tuple[Array, ...]:
    return tuple(lax.index_in_dim(value, index, axis=dim, keepdims=False) for index in range(value.shape[dim]))


def _offsets(shape: Sequence[int], strides: Sequence[int]) -> np.ndarray[Any, Any]:
    """Where in memory each element of a strided tensor lies, relative to its first."""
    offsets = np.zeros(tuple(shape), np.int64)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        offsets += (np.arange(size) * stride).reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return offsets


def _elements(
    operation: Operation, size: Sequence[int], stride: Sequence[int], storage_offset: int | None
) -> np.ndarray[Any, Any]:
    """Which elements of a strided operation's first argument, counted in their order, make up its view."""
    base = operation.inputs[0][0]
    memory = _offsets(base.shape, base.stride()).reshape(-1) + base.storage_offset()
    element_at = np.zeros(int(memory.max(initial=0)) + 1, np.int64)
    element_at[memory] = np.arange(memory.size)
    first = base.storage_offset() if storage_offset is None else storage_offset
    elements: np.ndarray[Any, Any] = element_at[_offsets(size, stride) + first]
    return elements


@lowers(aten.as_strided.default, aten.as_strided_copy.default)
def _as_strided(
    operation: Operation, value: Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Array:
    return value.reshape(-1)[_elements(operation, size, stride, storage_offset)]


@lowers(aten.as_strided_scatter.default)
def _as_strided_scatter(
    operation: Operation,
    value: Array,
    source: Array,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Array:
    elements = _elements(operation, size, stride, storage_offset)
    return value.reshape(-1).at[elements].set(source.astype(value.dtype)).reshape(value.shape)


# Joining, repeating and reordering.


@lowers(aten.cat.default)
def _cat(operation: Operation, values: Sequence[Array], dim: int = 0) -> Array:
    # PyTorch lets empty vectors join tensors of any shape.
    joined = [value.astype(operation.dtype) for value in values if value.shape != (0,)]
    return jnp.concatenate(joined, axis=dim) if joined else jnp.zeros(operation.shape, operation.dtype)


@lowers(aten.stack.default)
def _stack(operation: Operation, values: Sequence[Array], dim: int = 0) -> Array:
    return jnp.stack([value.astype(operation.dtype) for value in values], axis=dim)


@lowers(aten.repeat.default)
def _repeat(operation: Operation, value: Array, repeats: Sequence[int]) -> Array:
    return jnp.tile(value, repeats)


@lowers(aten.repeat_interleave.self_int)
def _repeat_interleave(
    operation: Operation, value: Array, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Array:
    return jnp.repeat(value, repeats, axis=dim)


@lowers(aten.repeat_interleave.Tensor)
def _repeated_indices(operation: Operation, repeats: Array, *, output_size: int | None = None) -> Array:
    return jnp.repeat(jnp.arange(repeats.shape[0]), repeats, total_repeat_length=operation.shape[0])


@lowers(aten.roll.default)
def _roll(operation: Operation, value: Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> Array:
    return jnp.roll(value, tuple(shifts), tuple(dims)) if dims else jnp.roll(value, shifts[0])


@lowers(aten.flip.default)
def _flip(operation: Operation, value: Array, dims: Sequence[int]) -> Array:
    return jnp.flip(value, tuple(dims)) if value.ndim else value


@lowers(aten.constant_pad_nd.default)
def _constant_pad(operation: Operation, value: Array, pad: Sequence[int], filling: Any = 0) -> Array:
    # Pairs from the last dimension on.
    pairs = [(low, high, 0) for low, high in zip(pad[::2], pad[1::2], strict=True)]
    rest = [(0, 0, 0)] * (value.ndim - len(pairs))
    return lax.pad(value, jnp.asarray(filling, value.dtype), rest + pairs[::-1])


@lowers(aten.tril.default)
def _tril(operation: Operation, value: Array, diagonal: int = 0) -> Array:
    return jnp.tril(value, diagonal)


@lowers(aten.triu.default)
def _triu(operation: Operation, value: Array, diagonal: int = 0) -> Array:
    return jnp.triu(value, diagonal)


@lowers(aten.tril_indices.default, aten.triu_indices.default)
def _triangle(operation: Operation, row: int, column: int, offset: int = 0, **options: Any) -> Array:
    indices = np.tril_indices if operation.target is aten.tril_indices.default else np.triu_indices
    return jnp.asarray(np.stack(indices(row, offset, column)), operation.dtype)


__all__ = ["written"]
