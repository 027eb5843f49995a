"""Activations, each with the slope that PyTorch gives it where pieces meet."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from bridge.ops.pointwise import absolute, cast, with_slope_of
from bridge.ops.registry import Operation, lowers

aten = torch.ops.aten


@lowers(aten.relu.default)
def _relu(operation: Operation, value: Array) -> Array:
    return jnp.where(value <= 0, jnp.zeros_like(value), value)


@lowers(aten.leaky_relu.default)
def _leaky_relu(operation: Operation, value: Array, negative_slope: float = 0.01) -> Array:
    return jnp.where(value > 0, value, value * jnp.asarray(negative_slope, value.dtype))


@lowers(aten._prelu_kernel.default)
def _prelu(operation: Operation, value: Array, weight: Array) -> Array:
    return jnp.where(value > 0, value, value * weight)


@lowers(aten.elu.default)
def _elu(operation: Operation, value: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
    negative = jnp.expm1(jnp.where(value > 0, 0, value) * input_scale) * (alpha * scale)
    return jnp.where(value > 0, value * scale, negative)


@lowers(aten.celu.default)
def _celu(operation: Operation, value: Array, alpha: float = 1.0) -> Array:
    return _elu(operation, value, alpha, 1, 1 / alpha)


@lowers(aten.selu.default)
def _selu(operation: Operation, value: Array) -> Array:
    return _elu(operation, value, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@lowers(aten.hardtanh.default)
def _hardtanh(operation: Operation, value: Array, min_val: float = -1, max_val: float = 1) -> Array:
    low, high = cast(value.dtype, min_val, max_val)
    # Unlike `clamp`, flat on the bounds.
    return jnp.where(value <= low, low, jnp.where(value >= high, high, value))


@lowers(aten.relu6.default)
def _relu6(operation: Operation, value: Array) -> Array:
    return _hardtanh(operation, value, 0, 6)


@lowers(aten.hardsigmoid.default)
def _hardsigmoid(operation: Operation, value: Array) -> Array:
    clipped = _hardtanh(operation, value + 3, 0, 6)
    # PyTorch's own slope is a sixth in float32, also where everything else is wider.
    return with_slope_of(clipped / 6, clipped * float(np.float32(1 / 6)))


@lowers(aten.hardswish.default)
def _hardswish(operation: Operation, value: Array) -> Array:
    return jnp.where(value <= -3, 0, jnp.where(value >= 3, value, value * (value / 6 + 0.5)))


@lowers(aten.softplus.default)
def _softplus(operation: Operation, value: Array, beta: float = 1, threshold: float = 20) -> Array:
    linear = value * beta > threshold
    return jnp.where(linear, value, jnp.log1p(jnp.exp(jnp.where(linear, 0, value) * beta)) / beta)


@lowers(aten.log_sigmoid_forward.default)
def _log_sigmoid(operation: Operation, value: Array) -> tuple[Array, Array]:
    # The second result is for a gradient of PyTorch's own.
    return jnp.minimum(value, 0) - jnp.log1p(jnp.exp(-absolute(value))), jnp.zeros(
        operation.result[1].shape, value.dtype
    )


@lowers(aten.mish.default)
def _mish(operation: Operation, value: Array) -> Array:
    return value * jnp.tanh(jax.nn.softplus(value))


@lowers(aten.gelu.default)
def _gelu(operation: Operation, value: Array, *, approximate: str = "none") -> Array:
    return jax.nn.gelu(value, approximate=approximate == "tanh")


@lowers(aten.glu.default)
def _glu(operation: Operation, value: Array, dim: int = -1) -> Array:
    left, gate = jnp.split(value, 2, axis=dim)
    return left * jax.nn.sigmoid(gate)


@lowers(aten.threshold.default)
def _threshold(operation: Operation, value: Array, threshold: float, replacement: float) -> Array:
    return jnp.where(value <= threshold, jnp.asarray(replacement, value.dtype), value)


@lowers(aten.softshrink.default)
def _softshrink(operation: Operation, value: Array, lambd: float = 0.5) -> Array:
    return jnp.where(value > lambd, value - lambd, jnp.where(value < -lambd, value + lambd, value * 0))


@lowers(aten.hardshrink.default)
def _hardshrink(operation: Operation, value: Array, lambd: float = 0.5) -> Array:
    return jnp.where((value >= -lambd) & (value <= lambd), 0, value)
