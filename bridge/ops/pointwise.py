"""Operations that work element by element."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as special
import torch
from jax import Array, lax

from bridge.ops.registry import Lowering, Operation, lowers

aten = torch.ops.aten


def cast(dtype: jnp.dtype, *values: Any) -> tuple[Array, ...]:
    """Arrays of one dtype from arrays and Python numbers."""
    return tuple(as_array(value, dtype) for value in values)


def as_array(value: Any, dtype: jnp.dtype) -> Array:
    """An array of a dtype from an array or a Python number."""
    return jnp.asarray(value).astype(dtype)


def as_inexact(operation: Operation, value: Any) -> Array:
    """The value in the dtype in which PyTorch computes a function such as ``sin``: integers become floats."""
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(operation.dtype)


def _register(table: dict[Any, Callable[..., Array]], wrap: Callable[[Callable[..., Array]], Lowering]) -> None:
    for target, function in table.items():
        lowers(target)(wrap(function))


# One operand.


def _of_inexact(function: Callable[[Array], Array]) -> Lowering:
    return lambda operation, value: function(as_inexact(operation, value))


def _of_any(function: Callable[[Array], Array]) -> Lowering:
    return lambda operation, value: function(value)


def _unless_integer(function: Callable[[Array], Array]) -> Lowering:
    """PyTorch returns integers as they are; JAX would make floats of them."""
    return lambda operation, value: function(value) if jnp.issubdtype(value.dtype, jnp.inexact) else value


def absolute(value: Array) -> Array:
    """The absolute value; its slope at zero is zero, where JAX has one."""
    return value * lax.stop_gradient(jnp.sign(value)) if jnp.issubdtype(value.dtype, jnp.floating) else jnp.abs(value)


@jax.custom_jvp
def with_slope_of(value: Array, other: Array) -> Array:
    """The value, with the derivative of another expression."""
    return value


@with_slope_of.defjvp
def _with_slope_of_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return with_slope_of(*primals), tangents[1]


def _angle(value: Array) -> Array:
    if jnp.iscomplexobj(value):
        return jnp.angle(value)
    return jnp.where(jnp.isnan(value), value, jnp.where(value < 0, math.pi, 0))


def _sinc(value: Array) -> Array:
    at_zero = value == 0
    product = jnp.where(at_zero, 1, value * math.pi)
    return jnp.where(at_zero, 1, jnp.sin(product) / product)


@jax.custom_jvp
def _i0(value: Array) -> Array:
    return special.i0(value)


@_i0.defjvp
def _i0_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Of the two slopes that JAX has at zero, each is one.
    return _i0(*primals), special.i1(*primals) * tangents[0]


@jax.custom_jvp
def _trigamma(value: Array) -> Array:
    """The derivative of `_digamma`, by PyTorch's own series, whose error is visible in float64."""
    reflected = value < 0.5
    at = jnp.where(reflected, 1 - value, value)
    total = jnp.zeros_like(value)
    for _ in range(6):
        total, at = total + 1 / (at * at), at + 1
    inverse = 1 / (at * at)
    total += (1 + 1 / (2 * at) + inverse * (1 / 6 - inverse * (1 / 30 - inverse / 42))) / at
    return jnp.where(reflected, jnp.square(math.pi / jnp.sin(math.pi * value)) - total, total)


@_trigamma.defjvp
def _trigamma_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _trigamma(*primals), _higher_polygamma(2, primals[0]) * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _higher_polygamma(order: int, value: Array) -> Array:
    """Of order two and above; JAX's own series is wrong for arguments below about -8, which are moved up here."""

    def moved(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        at, total = state
        is_low = at < 0
        return jnp.where(is_low, at + 1, at), jnp.where(is_low, total + at ** -(order + 1), total)

    at, total = lax.fori_loop(0, 64, moved, (value, jnp.zeros_like(value)))
    return (-1) ** (order + 1) * math.factorial(order) * (total + special.zeta(order + 1, at))


@_higher_polygamma.defjvp
def _higher_polygamma_jvp(order: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _higher_polygamma(order, *primals), _higher_polygamma(order + 1, primals[0]) * tangents[0]


@jax.custom_jvp
def _digamma(value: Array) -> Array:
    return special.digamma(value)


@_digamma.defjvp
def _digamma_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _digamma(*primals), _trigamma(*primals) * tangents[0]


_register(
    {
        aten.acos.default: jnp.arccos,
        aten.acosh.default: jnp.arccosh,
        aten.asin.default: jnp.arcsin,
        aten.asinh.default: jnp.arcsinh,
        aten.atan.default: jnp.arctan,
        aten.atanh.default: jnp.arctanh,
        aten.cos.default: jnp.cos,
        aten.cosh.default: jnp.cosh,
        aten.deg2rad.default: lambda value: value * (math.pi / 180),
        aten.digamma.default: _digamma,
        aten.erf.default: special.erf,
        aten.erfc.default: special.erfc,
        aten.erfinv.default: special.erfinv,
        aten.exp.default: jnp.exp,
        aten.exp2.default: lambda value: jnp.exp2(value),
        aten.expm1.default: jnp.expm1,
        aten.lgamma.default: special.gammaln,
        aten.log.default: jnp.log,
        aten.log10.default: jnp.log10,
        aten.log1p.default: jnp.log1p,
        aten.log2.default: jnp.log2,
        aten.rad2deg.default: lambda value: value * (180 / math.pi),
        aten.reciprocal.default: lambda value: 1 / value,
        aten.rsqrt.default: lax.rsqrt,
        aten.sigmoid.default: jax.nn.sigmoid,
        aten.silu.default: lambda value: value * jax.nn.sigmoid(value),
        aten.sin.default: jnp.sin,
        aten.sinc.default: _sinc,
        aten.sinh.default: jnp.sinh,
        aten.special_entr.default: special.entr,
        aten.special_erfcx.default: lambda value: jnp.exp(value * value) * special.erfc(value),
        aten.special_i0e.default: special.i0e,
        aten.special_i1.default: special.i1,
        aten.special_i1e.default: special.i1e,
        aten.i0.default: _i0,
        aten.special_log_ndtr.default: special.log_ndtr,
        aten.special_ndtri.default: special.ndtri,
        aten.sqrt.default: jnp.sqrt,
        aten.tan.default: jnp.tan,
        aten.tanh.default: jnp.tanh,
    },
    _of_inexact,
)
_register(
    {
        aten._conj.default: jnp.conj,
        aten._conj_copy.default: jnp.conj,
        aten._conj_physical.default: jnp.conj,
        aten.conj_physical.default: jnp.conj,
        aten._neg_view.default: jnp.negative,
        aten._neg_view_copy.default: jnp.negative,
        aten.resolve_conj.default: lambda value: value,
        aten.resolve_neg.default: lambda value: value,
        aten.abs.default: absolute,
        aten.angle.default: _angle,
        aten.bitwise_not.default: jnp.bitwise_not,
        aten.imag.default: jnp.imag,
        aten.isfinite.default: jnp.isfinite,
        aten.isinf.default: jnp.isinf,
        aten.isnan.default: jnp.isnan,
        aten.isneginf.default: jnp.isneginf,
        aten.isposinf.default: jnp.isposinf,
        aten.logical_not.default: jnp.logical_not,
        aten.neg.default: jnp.negative,
        aten.positive.default: lambda value: value,
        aten.real.default: jnp.real,
        aten.sgn.default: jnp.sign,
        aten.sign.default: lambda value: value if value.dtype == jnp.bool_ else jnp.sign(value),
        aten.signbit.default: jnp.signbit,
        aten.square.default: lambda value: value * value,
    },
    _of_any,
)
_register(
    {
        aten.ceil.default: jnp.ceil,
        aten.floor.default: jnp.floor,
        aten.frac.default: lambda value: value - jnp.trunc(value),
        aten.round.default: jnp.round,
        aten.trunc.default: jnp.trunc,
    },
    _unless_integer,
)


@lowers(aten.round.decimals)
def _round(operation: Operation, value: Array, *, decimals: int) -> Array:
    scale = 10.0 ** abs(decimals)
    if decimals < 0:
        return jnp.round(value / scale) * scale
    return jnp.round(value * scale) / scale


@lowers(aten.logit.default)
def _logit(operation: Operation, value: Array, eps: float | None = None) -> Array:
    value = as_inexact(operation, value)
    if eps is not None:
        value = clamped(value, jnp.asarray(eps, value.dtype), jnp.asarray(1 - eps, value.dtype))
    return jnp.log(value / (1 - value))


@lowers(aten.frexp.Tensor)
def _frexp(operation: Operation, value: Array) -> tuple[Array, Array]:
    mantissa, exponent = jnp.frexp(lax.stop_gradient(value))
    return with_slope_of(mantissa, value * jnp.exp2(-exponent.astype(value.dtype))), exponent


@lowers(aten.mvlgamma.default)
def _mvlgamma(operation: Operation, value: Array, p: int) -> Array:
    return special.multigammaln(as_inexact(operation, value), p)


@lowers(aten.polygamma.default)
def _polygamma(operation: Operation, n: int, value: Array) -> Array:
    value = as_inexact(operation, value)
    if n < 2:
        return _trigamma(value) if n else _digamma(value)
    return _higher_polygamma(n, value)


@lowers(aten.nan_to_num.default)
def _nan_to_num(
    operation: Operation,
    value: Array,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> Array:
    return jnp.nan_to_num(value, nan=nan or 0.0, posinf=posinf, neginf=neginf)


# Two operands of one dtype.


def _of_two(function: Callable[[Array, Array], Array]) -> Lowering:
    return lambda operation, left, right: function(*jnp.broadcast_arrays(*cast(operation.common_dtype, left, right)))


def _of_two_inexact(function: Callable[[Array, Array], Array]) -> Lowering:
    return lambda operation, left, right: function(*cast(operation.dtype, left, right))


def _xlogy(left: Array, right: Array) -> Array:
    # Zero times an infinite logarithm is zero, and so is its slope.
    flat = (left == 0) & ((right <= 0) | jnp.isinf(right))
    return left * jnp.log(jnp.where(flat, 1, right))


def _copysign(left: Array, right: Array) -> Array:
    # Zero, which has no side, has no slope.
    flipped = jnp.where(jnp.signbit(left) == jnp.signbit(right), 1, -1)
    return with_slope_of(jnp.copysign(left, right), left * jnp.where(left == 0, 0, flipped))


def _hypot(left: Array, right: Array) -> Array:
    squares = left * left + right * right
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def _in_overloads(names: str, *overloads: str) -> list[tuple[str, Any]]:
    """Every overload that exists of some operations, with its operation's name."""
    found = []
    for name in names.split():
        packet = getattr(aten, name)
        found += [(name, getattr(packet, overload)) for overload in overloads if overload in packet.overloads()]
    return found


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "mul": jnp.multiply,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "fmod": lax.rem,
    "remainder": jnp.remainder,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
    "bitwise_left_shift": jnp.left_shift,
    "__lshift__": jnp.left_shift,
    "__rshift__": jnp.right_shift,
    "bitwise_right_shift": jnp.right_shift,
    "gcd": jnp.gcd,
    "lcm": jnp.lcm,
    "hypot": _hypot,
}
for _name, _target in _in_overloads(" ".join(_BINARY), "default", "Tensor", "Scalar", "Scalar_Tensor", "Tensor_Scalar"):
    lowers(_target)(_of_two(_BINARY[_name]))

_BINARY_INEXACT: dict[str, Callable[[Array, Array], Array]] = {
    "atan2": jnp.arctan2,
    "copysign": _copysign,
    "heaviside": jnp.heaviside,
    "ldexp": lambda left, right: left * jnp.exp2(right),
    "logaddexp": jnp.logaddexp,
    "logaddexp2": jnp.logaddexp2,
    "special_zeta": special.zeta,
    "igamma": special.gammainc,
    "igammac": special.gammaincc,
    "xlogy": _xlogy,
    "special_xlog1py": lambda left, right: _xlogy(left, 1 + right),
}
for _name, _target in _in_overloads(
    " ".join(_BINARY_INEXACT),
    "default",
    "Tensor",
    "Scalar",
    "self_scalar",
    "other_scalar",
    "Scalar_Self",
    "Scalar_Other",
):
    lowers(_target)(_of_two_inexact(_BINARY_INEXACT[_name]))


def _scaled(dtype: jnp.dtype, value: Array, factor: Any) -> Array:
    return value if factor == 1 else value * jnp.asarray(factor, dtype)


@lowers(aten.add.Tensor, aten.add.Scalar)
def _add(operation: Operation, left: Any, right: Any, alpha: Any = 1) -> Array:
    first, second = cast(operation.common_dtype, left, right)
    return first + _scaled(operation.common_dtype, second, alpha)


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def _sub(operation: Operation, left: Any, right: Any, alpha: Any = 1) -> Array:
    first, second = cast(operation.common_dtype, left, right)
    return first - _scaled(operation.common_dtype, second, alpha)


@lowers(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(operation: Operation, left: Any, right: Any, alpha: Any = 1) -> Array:
    return _sub(operation, right, left, alpha)


@lowers(
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.true_divide.Tensor,
)
def _div(operation: Operation, left: Any, right: Any, rounding_mode: str | None = None) -> Array:
    above, below = cast(operation.dtype, left, right)
    if rounding_mode is None:
        return above / below
    if rounding_mode == "floor":
        return jnp.floor_divide(above, below)
    if jnp.issubdtype(operation.dtype, jnp.integer):
        return lax.div(*jnp.broadcast_arrays(above, below))
    return jnp.trunc(above / below)


@lowers(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divide(operation: Operation, left: Any, right: Any) -> Array:
    return _div(operation, left, right, "floor")


@lowers(aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar)
def _pow(operation: Operation, base: Any, exponent: Any) -> Array:
    if isinstance(exponent, (int, float)) and float(exponent).is_integer() and abs(exponent) <= 8:
        return lax.integer_pow(as_array(base, operation.dtype), int(exponent))
    if isinstance(exponent, float) and exponent == 0.5:
        return jnp.sqrt(as_array(base, operation.dtype))
    base, power = cast(operation.dtype, base, exponent)
    if not isinstance(exponent, Array) or jnp.iscomplexobj(base):
        return jnp.power(base, power)
    # A power of zero has no slope along its exponent, and the power zero of zero has none at all.
    flat = (base == 0) & (power >= 0)
    of_zero = jnp.power(jnp.where(power == 0, 1, base), lax.stop_gradient(power))
    return jnp.where(flat, of_zero, jnp.power(jnp.where(flat, 1, base), power))


@lowers(aten.fmax.default)
def _fmax(operation: Operation, left: Array, right: Array) -> Array:
    left, right = cast(operation.common_dtype, left, right)
    return jnp.where((left >= right) | jnp.isnan(right), left, right)


@lowers(aten.fmin.default)
def _fmin(operation: Operation, left: Array, right: Array) -> Array:
    left, right = cast(operation.common_dtype, left, right)
    return jnp.where((left <= right) | jnp.isnan(right), left, right)


# Three operands.


@lowers(aten.where.self)
def _where(operation: Operation, condition: Array, left: Array, right: Array) -> Array:
    return jnp.where(condition, as_array(left, operation.dtype), as_array(right, operation.dtype))


@lowers(aten.addcmul.default)
def _addcmul(operation: Operation, base: Array, left: Array, right: Array, *, value: Any = 1) -> Array:
    base, left, right = cast(operation.dtype, base, left, right)
    return base + _scaled(operation.dtype, left * right, value)


@lowers(aten.addcdiv.default)
def _addcdiv(operation: Operation, base: Array, left: Array, right: Array, *, value: Any = 1) -> Array:
    base, left, right = cast(operation.dtype, base, left, right)
    return base + _scaled(operation.dtype, left, value) / right


@lowers(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(operation: Operation, start: Array, end: Array, weight: Any) -> Array:
    weight = as_array(weight, operation.dtype)
    # As PyTorch, so that both ends are met exactly.
    return jnp.where(jnp.abs(weight) < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


def clamped(value: Array, low: Array | None, high: Array | None) -> Array:
    """The value between bounds; the slope is one on the bounds themselves, too."""
    if low is not None:
        value = jnp.where(value < low, low, value)
    if high is not None:
        value = jnp.where(value > high, high, value)
    return value


@lowers(aten.clamp.default, aten.clamp.Tensor)
def _clamp(operation: Operation, value: Array, min: Any = None, max: Any = None) -> Array:
    low, high = (None if bound is None else as_array(bound, operation.dtype) for bound in (min, max))
    return clamped(value.astype(operation.dtype), low, high)


@lowers(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(operation: Operation, value: Array, min: Any) -> Array:
    return clamped(value.astype(operation.dtype), as_array(min, operation.dtype), None)


@lowers(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(operation: Operation, value: Array, max: Any) -> Array:
    return clamped(value.astype(operation.dtype), None, as_array(max, operation.dtype))


# Conversions.


@lowers(aten._to_copy.default)
def _to_copy(operation: Operation, value: Array, **options: Any) -> Array:
    if jnp.iscomplexobj(value) and not jnp.issubdtype(operation.dtype, jnp.complexfloating):
        value = value.real
    return value.astype(operation.dtype)


@lowers(aten.complex.default)
def _complex(operation: Operation, real: Array, imaginary: Array) -> Array:
    return lax.complex(*jnp.broadcast_arrays(real, imaginary))


@lowers(aten.polar.default)
def _polar(operation: Operation, length: Array, angle: Array) -> Array:
    return lax.complex(*jnp.broadcast_arrays(length * jnp.cos(angle), length * jnp.sin(angle)))


__all__ = ["absolute", "as_array", "as_inexact", "cast", "clamped", "with_slope_of"]
