"""Normalisation by statistics of the input: batch, layer and group norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch
from jax import lax

from bridge.ops.registry import Operation, lowers

aten = torch.ops.aten

_Three = tuple[jax.Array, jax.Array, jax.Array]


@lowers(aten._native_batch_norm_legit_functional.default)
def batch_norm(
    operation: Operation,
    input: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array,
    running_var: jax.Array,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, ...]:
    """Normalise each channel; the running statistics are returned as new values."""
    if not training:
        three = batch_norm_no_training(operation, input, weight, bias, running_mean, running_var, momentum, eps)
        return (*three, running_mean, running_var)
    output, mean, inverse, var = _by_batch(input, weight, bias, eps)
    # What is kept for later evaluation is the unbiased variance.
    count = input.size // input.shape[1]
    unbiased = var * (count / max(count - 1, 1)) if count != 1 else jnp.full_like(var, math.nan)
    new_mean = momentum * mean + (1 - momentum) * running_mean
    new_var = momentum * unbiased + (1 - momentum) * running_var
    return output, mean, inverse, new_mean, new_var


@lowers(aten._native_batch_norm_legit.no_stats)
def batch_norm_no_stats(
    operation: Operation,
    input: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> _Three:
    """Normalise each channel by the batch; nothing is kept."""
    output, mean, inverse, _ = _by_batch(input, weight, bias, eps)
    return output, mean, inverse


@lowers(aten._native_batch_norm_legit_no_training.default)
def batch_norm_no_training(
    operation: Operation,
    input: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array,
    running_var: jax.Array,
    momentum: float,
    eps: float,
) -> _Three:
    """Normalise each channel by the running statistics."""
    inverse = lax.rsqrt(_accurate(running_var) + eps)
    output = (_accurate(input) - _by_channel(running_mean, input)) * _by_channel(inverse, input)
    # PyTorch returns statistics of the batch here, which there are none of.
    saved = [jnp.zeros(result.shape, inverse.dtype) for result in operation.result[1:3]]
    return _scaled(output, weight, bias), saved[0], saved[1]


def _by_batch(
    input: jax.Array, weight: jax.Array | None, bias: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    axes = (0, *range(2, input.ndim))
    output, mean, inverse, var = _normalised(_accurate(input), axes, eps)
    flat = [lax.stop_gradient(statistic.reshape(-1)) for statistic in (mean, inverse, var)]
    return _scaled(output, weight, bias), flat[0], flat[1], flat[2]


def _normalised(input: jax.Array, axes: Sequence[int], eps: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The input with mean 0 and variance 1 along the axes; mean, inverse deviation and biased variance."""
    mean = input.mean(axes, keepdims=True)
    centred = input - mean
    var = jnp.square(centred).mean(axes, keepdims=True)
    inverse = lax.rsqrt(var + eps)
    return centred * inverse, mean, inverse, var


def _accurate(array: jax.Array) -> jax.Array:
    """Half precision as float32, in which PyTorch computes statistics."""
    return array.astype(jnp.float32) if array.dtype in (jnp.float16, jnp.bfloat16) else array


def _by_channel(vector: jax.Array, input: jax.Array) -> jax.Array:
    return _accurate(vector).reshape(-1, *[1] * (input.ndim - 2))


def _scaled(output: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """The output with a factor and a summand for each channel."""
    if weight is not None:
        output = output * _by_channel(weight, output)
    return output if bias is None else output + _by_channel(bias, output)


@lowers(aten.native_layer_norm.default)
def layer_norm(
    operation: Operation,
    input: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
) -> _Three:
    """Normalise over the last axes."""
    axes = range(input.ndim - len(normalized_shape), input.ndim)
    output, mean, inverse, _ = _normalised(_accurate(input), tuple(axes), eps)
    if weight is not None:
        output = output * _accurate(weight)
    if bias is not None:
        output = output + _accurate(bias)
    return output, mean, inverse


@lowers(aten.native_group_norm.default)
def group_norm(
    operation: Operation,
    input: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> _Three:
    """Normalise over groups of channels and all positions."""
    grouped = _accurate(input).reshape(N, group, C // group * HxW)
    output, mean, inverse, _ = _normalised(grouped, (2,), eps)
    return _scaled(output.reshape(input.shape), weight, bias), mean[..., 0], inverse[..., 0]
