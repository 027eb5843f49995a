"""Matrix products and distances between rows."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from bridge.ops.pointwise import absolute, with_slope_of
from bridge.ops.reductions import vector_norm
from bridge.ops.registry import Operation, lowers

aten = torch.ops.aten


@lowers(
    aten.mm.default,
    aten.bmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.matmul.default,
)
def _matmul(operation: Operation, left: Array, right: Array) -> Array:
    return jnp.matmul(left, right)


@lowers(aten.vdot.default)
def _vdot(operation: Operation, left: Array, right: Array) -> Array:
    return jnp.vdot(left, right)


@lowers(aten.linear.default)
def _linear(operation: Operation, value: Array, weight: Array, bias: Array | None = None) -> Array:
    product = jnp.matmul(value, weight.T)
    return product if bias is None else product + bias


def _sum_with(value: Array, product: Array, beta: Any, alpha: Any) -> Array:
    """``beta * value + alpha * product``; with a zero ``beta`` the value is not looked at."""
    scaled = product if alpha == 1 else product * jnp.asarray(alpha, product.dtype)
    if beta == 0:
        return scaled
    return (value if beta == 1 else value * jnp.asarray(beta, value.dtype)) + scaled


@lowers(aten.addmm.default, aten.addmv.default, aten.baddbmm.default)
def _addmm(operation: Operation, value: Array, left: Array, right: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    return jnp.broadcast_to(_sum_with(value, jnp.matmul(left, right), beta, alpha), operation.shape)


@lowers(aten.addbmm.default)
def _addbmm(operation: Operation, value: Array, left: Array, right: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    return _sum_with(value, jnp.einsum("bij,bjk->ik", left, right), beta, alpha)


@lowers(aten.addr.default)
def _addr(operation: Operation, value: Array, left: Array, right: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    return _sum_with(value, jnp.outer(left, right), beta, alpha)


@lowers(aten._trilinear.default)
def _trilinear(
    operation: Operation,
    first: Array,
    second: Array,
    third: Array,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Array:
    letters = string.ascii_letters[: first.ndim + len(expand1)]
    operands = [
        "".join(letter for axis, letter in enumerate(letters) if axis not in expanded)
        for expanded in (expand1, expand2, expand3)
    ]
    kept = "".join(letter for axis, letter in enumerate(letters) if axis not in sumdim)
    return jnp.einsum(f"{','.join(operands)}->{kept}", first, second, third)


def _distance(difference: Array, order: float) -> Array:
    distance = vector_norm(difference, order, (difference.ndim - 1,), False)
    if order != math.inf:
        return distance
    # Unlike in a norm, all components that reach the largest one get the whole gradient.
    size = absolute(difference)
    return with_slope_of(distance, jnp.sum(jnp.where(size == distance[..., None], size, 0), axis=-1))


@lowers(aten._cdist_forward.default)
def _cdist(operation: Operation, left: Array, right: Array, p: float, compute_mode: int | None) -> Array:
    return _distance(left[..., :, None, :] - right[..., None, :, :], p)


@lowers(aten._euclidean_dist.default)
def _euclidean_distance(operation: Operation, left: Array, right: Array) -> Array:
    return _distance(left[..., :, None, :] - right[..., None, :, :], 2)


@lowers(aten._pdist_forward.default)
def _pdist(operation: Operation, value: Array, p: float = 2) -> Array:
    first, second = np.triu_indices(value.shape[0], 1)
    return _distance(value[first] - value[second], p)
