"""Losses, and the normalised exponentials in front of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from bridge.dtypes import as_jax_dtype
from bridge.ops.bounds import read_along
from bridge.ops.pointwise import absolute
from bridge.ops.reductions import axes
from bridge.ops.registry import Operation, lowers

aten = torch.ops.aten

# How losses are reduced, as PyTorch numbers it.
_NONE, _MEAN, _SUM = 0, 1, 2


def _reduced(loss: Array, reduction: int) -> Array:
    return {_NONE: lambda: loss, _MEAN: lambda: jnp.mean(loss), _SUM: lambda: jnp.sum(loss)}[reduction]()


# Normalised exponentials, computed in the dtype of the result.


@lowers(aten._softmax.default, aten._safe_softmax.default)
def _softmax(operation: Operation, value: Array, dim: int, *rest: Any, **options: Any) -> Array:
    value = value.astype(operation.dtype)
    if value.ndim == 0:
        return jnp.ones_like(value)
    if operation.target is aten._softmax.default:
        return jax.nn.softmax(value, axis=dim)
    # Rows without any allowed element are zero, and so is their gradient.
    empty = jnp.all(value == -jnp.inf, axis=dim, keepdims=True)
    return jnp.where(empty, 0, jax.nn.softmax(jnp.where(empty, 0, value), axis=dim))


@lowers(aten._log_softmax.default)
def _log_softmax(operation: Operation, value: Array, dim: int, half_to_float: bool) -> Array:
    value = value.astype(operation.dtype)
    return jax.nn.log_softmax(value, axis=dim) if value.ndim else value * 0


@lowers(aten.logsumexp.default)
def _logsumexp(operation: Operation, value: Array, dim: Any, keepdim: bool = False) -> Array:
    return jax.nn.logsumexp(value.astype(operation.dtype), axis=axes(value, dim), keepdims=keepdim)


# Of classes.


def _class_losses(
    scores: Array, target: Array, weight: Array | None, ignore_index: int, axis: int
) -> tuple[Array, Array]:
    """The weighted loss and the weight of each target; both are zero where it is to be ignored.

    The loss of a target that is no class, where PyTorch raises, is NaN.
    """
    counted = target != ignore_index
    safe = jnp.where(counted, target, 0)
    chosen = jnp.squeeze(read_along(scores, jnp.expand_dims(safe, axis), axis), axis)
    weights = jnp.ones(target.shape, scores.dtype) if weight is None else weight[safe]
    weights = jnp.where(counted, weights, 0)
    return jnp.where(counted, -chosen * weights, 0), weights


@lowers(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def _nll_loss(
    operation: Operation, scores: Array, target: Array, weight: Array | None, reduction: int, ignore_index: int
) -> tuple[Array, Array]:
    axis = 0 if scores.ndim == 1 else 1
    losses, weights = _class_losses(scores, target, weight, ignore_index, axis)
    total = jnp.sum(weights)
    if reduction == _NONE:
        return losses, jnp.zeros(operation.result[1].shape, as_jax_dtype(operation.result[1].dtype))
    # Without any weight the mean is 0 / 0, as in PyTorch.
    return (jnp.sum(losses) / total if reduction == _MEAN else jnp.sum(losses)), total


@lowers(aten.multi_margin_loss.default)
def _multi_margin_loss(
    operation: Operation,
    scores: Array,
    target: Array,
    p: Any = 1,
    margin: Any = 1,
    weight: Array | None = None,
    reduction: int = _MEAN,
) -> Array:
    rows, targets = jnp.atleast_2d(scores), jnp.atleast_1d(target)
    own = read_along(rows, targets[:, None], 1)
    short = margin - own + rows
    # So that NaN, for a target that is no class, stays.
    short = jnp.where(short <= 0, 0, short)
    losses = short if p == 1 else short * short
    if weight is not None:
        losses = losses * weight[targets][:, None]
    losses = jnp.where(jnp.arange(rows.shape[1]) == targets[:, None], 0, losses)
    return _reduced((jnp.sum(losses, axis=1) / rows.shape[1]).reshape(target.shape), reduction)


@lowers(aten.multilabel_margin_loss_forward.default)
def _multilabel_margin_loss(operation: Operation, scores: Array, target: Array, reduction: int) -> tuple[Array, Array]:
    rows, targets = jnp.atleast_2d(scores), jnp.atleast_2d(target)
    # Targets count up to the first -1. Any other number that is no class gives NaN, where PyTorch raises.
    listed = jnp.cumprod(targets != -1, axis=1).astype(bool)
    safe = jnp.where(listed, targets, 0)
    classes = jnp.arange(rows.shape[1])
    is_target = jnp.any(listed[:, :, None] & (safe[:, :, None] == classes), axis=1)
    distance = 1 - read_along(rows, safe, 1)[:, :, None] + rows[:, None, :]
    counted = listed[:, :, None] & ~is_target[:, None, :] & ~(distance <= 0)
    losses = jnp.sum(jnp.where(counted, distance, 0), axis=(1, 2)) / rows.shape[1]
    return _reduced(losses.reshape(scores.shape[:-1]), reduction), is_target.reshape(target.shape)


# Of pairs of values.


@lowers(aten.mse_loss.default)
def _mse_loss(operation: Operation, value: Array, target: Array, reduction: int = _MEAN) -> Array:
    difference = value - target
    return _reduced(difference * difference, reduction)


@lowers(aten.huber_loss.default)
def _huber_loss(operation: Operation, value: Array, target: Array, reduction: int = _MEAN, delta: float = 1.0) -> Array:
    difference = value - target
    size = absolute(difference)
    return _reduced(jnp.where(size <= delta, 0.5 * difference * difference, delta * (size - 0.5 * delta)), reduction)


@lowers(aten.smooth_l1_loss.default)
def _smooth_l1_loss(
    operation: Operation, value: Array, target: Array, reduction: int = _MEAN, beta: float = 1.0
) -> Array:
    difference = value - target
    size = absolute(difference)
    if beta == 0:
        return _reduced(size, reduction)
    return _reduced(jnp.where(size < beta, 0.5 * difference * difference / beta, size - 0.5 * beta), reduction)


@lowers(aten.soft_margin_loss.default)
def _soft_margin_loss(operation: Operation, value: Array, target: Array, reduction: int = _MEAN) -> Array:
    return _reduced(jnp.log1p(jnp.exp(-target * value)), reduction)


# PyTorch's own bound on the slope, a number in float32, also where everything else is wider.
_SMALLEST_VARIANCE = float(np.float32(1e-12))


@jax.custom_jvp
def _cross_entropy_of_probability(probability: Array, target: Array) -> Array:
    # Logarithms end at -100, so that a probability of zero has a finite loss.
    yes = jnp.maximum(jnp.log(probability), -100)
    no = jnp.maximum(jnp.log1p(-probability), -100)
    return (target - 1) * no - target * yes


@_cross_entropy_of_probability.defjvp
def _cross_entropy_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    probability, target = primals
    slope = (probability - target) / jnp.maximum((1 - probability) * probability, _SMALLEST_VARIANCE)
    of_target = jnp.log1p(-probability) - jnp.log(probability)
    return _cross_entropy_of_probability(*primals), slope * tangents[0] + of_target * tangents[1]


@lowers(aten.binary_cross_entropy.default)
def _binary_cross_entropy(
    operation: Operation, probability: Array, target: Array, weight: Array | None = None, reduction: int = _MEAN
) -> Array:
    """PyTorch raises where a probability or target is not within [0, 1]; here that element's loss is NaN."""
    # The logarithms see to the probabilities.
    loss = jnp.where((target >= 0) & (target <= 1), _cross_entropy_of_probability(probability, target), jnp.nan)
    return _reduced(loss if weight is None else loss * weight, reduction)
