"""Coefficients of nine optimizers from a step count inside a program, in float64 or in float32.

`mb_torch.stacked.update_rules` has the same numbers on the host, with all digits. In float32 its formulas would lose
most of them early on: ``1 - 0.999 ** step`` is a difference of almost equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import torch
from jax import Array

from mb_jax.transforms.leaves import Numbers


class Moment(NamedTuple):
    """What the coefficients of one step come from.

    Attributes:
        step: The step's number, from 1 on, as a floating-point array.
        lr: The learning rate, in the same dtype.
        hyper: The other hyper-parameters, as Python floats.
        product: NAdam's product of momenta, this step's included; else 1.
    """

    step: Array
    lr: Array
    hyper: Mapping[str, float]
    product: Array


def nadam_momentum(step: Array, hyper: Mapping[str, float]) -> Array:
    """NAdam's momentum at a step."""
    return hyper["beta1"] * (1.0 - 0.5 * jnp.exp(step * (hyper["momentum_decay"] * math.log(0.96))))


def _log(base: float) -> float:
    return math.log(base) if base > 0.0 else -math.inf


def _one_minus_power(base: float, step: Array) -> Array:
    """`1 - base ** step`, to the last digits."""
    return -jnp.expm1(step * _log(base))


def _sgd(moment: Moment) -> dict[str, Any]:
    hyper = moment.hyper
    return {
        "lr": -moment.lr,
        "decay": hyper["weight_decay"],
        "momentum": hyper["momentum"],
        "weight": jnp.where(moment.step == 1.0, 1.0, 1.0 - hyper["dampening"]),
    }


def _averages(moment: Moment) -> dict[str, Any]:
    """Numbers of the running averages and of weight decay in the Adam family."""
    hyper = moment.hyper
    return {
        "decay": hyper["weight_decay"],
        "shrink": 1.0 - moment.lr * hyper["weight_decay"],
        "first": 1.0 - hyper["beta1"],
        "second_keep": hyper["beta2"],
        "second": 1.0 - hyper["beta2"],
    }


def _adam(moment: Moment) -> dict[str, Any]:
    hyper = moment.hyper
    correction = jnp.sqrt(_one_minus_power(hyper["beta2"], moment.step))
    return {
        **_averages(moment),
        "eps": hyper["eps"] * correction,
        "size": -moment.lr * correction / _one_minus_power(hyper["beta1"], moment.step),
    }


def _nadam(moment: Moment) -> dict[str, Any]:
    step, lr, hyper, narrow_product = moment
    product = narrow_product.astype(step.dtype)
    following = nadam_momentum(step + 1.0, hyper)
    correction = jnp.sqrt(_one_minus_power(hyper["beta2"], step))
    return {
        **_averages(moment),
        "eps": hyper["eps"] * correction,
        "gradient_size": -lr * correction * (1.0 - nadam_momentum(step, hyper)) / (1.0 - product),
        "average_size": -lr * correction * following / (1.0 - product * following),
    }


# coth(x) - 1 / x = 2 * sum of (-1)^(n+1) zeta(2n) x^(2n-1) / pi^(2n); at 1/2 the first term left out is 4e-15.
_SERIES = [1 / 3, -1 / 45, 2 / 945, -1 / 4725, 2 / 93555, -1382 / 638512875, 4 / 18243225, -3617 / 162820783125]


def _langevin(x: Any) -> Any:
    """`coth(x) - 1 / x` for x up to 1/2, without the difference."""
    total = 0.0
    for factor in reversed(_SERIES):
        total = total * x * x + factor
    return total * x


def averaged_length(beta2: float, step: Array) -> Array:
    """RAdam's ``2 / (1 - beta2) - 1 - 2 step beta2^step / (1 - beta2^step)``, to the last digits.

    Early on that is a small difference of large numbers. With ``a = -log(beta2)`` it is ``coth(a / 2) + step - step
    coth(a step / 2)``, where the large parts of the hyperbolic cotangents, 1 over their argument, cancel.
    """
    rate = -_log(beta2)
    late = 2.0 / (1.0 - beta2) - 1.0 - 2.0 * step / jnp.expm1(step * rate)
    if rate >= 1.0:
        return late
    early = step - step * _langevin(0.5 * rate * step) + _langevin(0.5 * rate)
    return jnp.where(rate * step < 1.0, early, late)


def _radam(moment: Moment) -> dict[str, Any]:
    beta2 = moment.hyper["beta2"]
    limit = 2.0 / (1.0 - beta2) - 1.0
    length = averaged_length(beta2, moment.step)
    tractable = length > 5.0
    plain = -moment.lr / _one_minus_power(moment.hyper["beta1"], moment.step)
    # Not below the bound where it is not used, so that no NaN arises.
    used = jnp.maximum(length, 5.0)
    scale = max(limit, 5.0)
    ratio = (used - 4.0) * (used - 2.0) * scale / ((scale - 4.0) * (scale - 2.0) * used)
    rectified = plain * jnp.sqrt(_one_minus_power(beta2, moment.step) * ratio)
    return {
        **_averages(moment),
        "eps": moment.hyper["eps"],
        "tractable": tractable,
        "size": jnp.where(tractable, rectified, plain),
    }


def _adamax(moment: Moment) -> dict[str, Any]:
    hyper = moment.hyper
    return {
        "decay": hyper["weight_decay"],
        "first": 1.0 - hyper["beta1"],
        "norm_keep": hyper["beta2"],
        "eps": hyper["eps"],
        "size": -moment.lr / _one_minus_power(hyper["beta1"], moment.step),
    }


def _rmsprop(moment: Moment) -> dict[str, Any]:
    hyper = moment.hyper
    return {
        "decay": hyper["weight_decay"],
        "keep": hyper["alpha"],
        "new": 1.0 - hyper["alpha"],
        "eps": hyper["eps"],
        "momentum": hyper["momentum"],
        "lr": -moment.lr,
    }


def _adagrad(moment: Moment) -> dict[str, Any]:
    hyper = moment.hyper
    return {
        "decay": hyper["weight_decay"],
        "eps": hyper["eps"],
        "size": -moment.lr / (1.0 + (moment.step - 1.0) * hyper["lr_decay"]),
    }


def _adadelta(moment: Moment) -> dict[str, Any]:
    hyper = moment.hyper
    return {
        "decay": hyper["weight_decay"],
        "keep": hyper["rho"],
        "new": 1.0 - hyper["rho"],
        "eps": hyper["eps"],
        "lr": -moment.lr,
    }


COEFFICIENTS: dict[type[torch.optim.Optimizer], Callable[[Moment], Numbers]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _nadam,
    torch.optim.RAdam: _radam,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adadelta: _adadelta,
}
