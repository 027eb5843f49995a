"""The update rules of nine optimizers; `mb_torch.stacked.updates` says what a rule consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mb_torch.stacked.buckets import (
    Bucket,
    Tensors,
    Value,
    add_,
    add_product_,
    add_quotient_,
    add_scaled_,
    choose,
    copy_,
    lerp_,
    power,
    root,
    scale_,
)
from mb_torch.stacked.updates import Rule


def _momentum_flags(momenta: Sequence[float]) -> dict[str, bool]:
    """Whether any model has momentum, and whether some have and some have not."""
    return {"momentum": any(momenta), "some_without": any(momenta) and not all(momenta)}


class _SGD(Rule):
    """Stochastic gradient descent, with momentum, dampening and Nesterov momentum.

    Its counter says how often a momentum buffer was used, up to two: the first time the buffer is the
    gradient itself, without dampening.
    """

    numbers = ("lr", "momentum", "dampening", "weight_decay")
    switches = ("nesterov", "maximize")
    counters = ("uses",)
    saved_counters = ()
    optional: ClassVar[Mapping[str, str]] = {"momentum_buffer": "momentum"}
    masks = frozenset({"with_momentum"})

    def flags(self, columns: Mapping[str, Sequence[float]], switches: Mapping[str, bool]) -> dict[str, bool]:
        return {**super().flags(columns, switches), **_momentum_flags(columns["momentum"])}

    def advance(self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]) -> list[Value]:
        uses, momentum = clock[0], hyper["momentum"]
        uses = uses + (momentum.ne(0) if isinstance(momentum, Tensor) else float(momentum != 0))
        return [uses.clamp(max=2.0) if isinstance(uses, Tensor) else min(uses, 2.0)]

    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        numbers: dict[str, Any] = {"lr": -hyper["lr"], "decay": hyper["weight_decay"]}
        if flags["momentum"]:
            uses, momentum, weight = clock[0], hyper["momentum"], 1.0 - hyper["dampening"]
            numbers["momentum"] = momentum
            if isinstance(uses, Tensor):
                numbers["weight"] = choose(uses == 1.0, 1.0, weight)
            else:
                numbers["weight"] = 1.0 if uses == 1.0 else weight
            if flags["some_without"]:
                numbers["with_momentum"] = momentum.ne(0)  # type: ignore[union-attr]
        return numbers

    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        direction = bucket.gradients(flags, numbers["decay"])
        if flags["momentum"]:
            buffers = bucket.state["momentum_buffer"]
            before = [buffer.clone() for buffer in buffers] if flags["some_without"] else buffers
            scale_(buffers, bucket.rows(numbers["momentum"]))
            add_scaled_(buffers, direction, bucket.rows(numbers["weight"]))
            new = buffers
            if flags["nesterov"]:
                momentum = bucket.rows(numbers["momentum"])
                ahead = [one.clone() for one in direction]
                add_scaled_(ahead, new, momentum)
                new = ahead
            if flags["some_without"]:
                new = bucket.where(numbers["with_momentum"], new, direction)
                copy_(buffers, bucket.where(numbers["with_momentum"], buffers, before))
            direction = new
        add_scaled_(bucket.params, direction, bucket.rows(numbers["lr"]))


class _Adam(Rule):
    """Adam and AdamW."""

    numbers = ("lr", "betas", "eps", "weight_decay")
    switches = ("amsgrad", "maximize", "decoupled_weight_decay")
    always = ("exp_avg", "exp_avg_sq")
    optional: ClassVar[Mapping[str, str]] = {"max_exp_avg_sq": "amsgrad"}
    has_kernel = True

    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        # lr / c1 * m / (sqrt(v) / sqrt(c2) + eps), with the whole-stack division by sqrt(c2) moved into two
        # numbers.
        correction = root(1.0 - power(hyper["beta2"], clock[0]))
        return {
            **_moment_numbers(hyper, flags),
            "eps": hyper["eps"] * correction,
            "size": hyper["lr"] * (-correction / (1.0 - power(hyper["beta1"], clock[0]))),
        }

    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        first, second = _moments(bucket, numbers, bucket.gradients(flags, numbers["decay"]))
        if flags["amsgrad"]:
            torch._foreach_maximum_(bucket.state["max_exp_avg_sq"], second)
            second = bucket.state["max_exp_avg_sq"]
        scale = torch._foreach_sqrt(second)
        add_(scale, bucket.rows(numbers["eps"]))
        _shrink(bucket, numbers, flags)
        add_quotient_(bucket.params, first, scale, bucket.rows(numbers["size"]))

    def update_by_kernel(
        self, bucket: Bucket, clock: Sequence[Value], hyper: Mapping[str, Any], flags: Mapping[str, bool]
    ) -> None:
        kernel = torch._fused_adamw_ if flags["decoupled_weight_decay"] else torch._fused_adam_
        step = torch.full((), float(clock[0]), dtype=torch.float32, device=bucket.params[0].device)
        kernel(
            bucket.params,
            bucket.grads,
            bucket.state["exp_avg"],
            bucket.state["exp_avg_sq"],
            bucket.state["max_exp_avg_sq"] if flags["amsgrad"] else [],
            [step] * len(bucket.params),
            lr=hyper["lr"],
            beta1=hyper["beta1"],
            beta2=hyper["beta2"],
            weight_decay=hyper["weight_decay"],
            eps=hyper["eps"],
            amsgrad=flags["amsgrad"],
            maximize=flags["maximize"],
        )


def _moment_numbers(hyper: Mapping[str, Value], flags: Mapping[str, bool]) -> dict[str, Value]:
    """Numbers of the running averages and of weight decay in the Adam family."""
    return {
        "decay": hyper["weight_decay"],
        "shrink": 1.0 - hyper["lr"] * hyper["weight_decay"] if flags["shrink"] else 1.0,
        "first": 1.0 - hyper["beta1"],
        "second_keep": hyper["beta2"],
        "second": 1.0 - hyper["beta2"],
    }


def _moments(bucket: Bucket, numbers: Mapping[str, Any], grads: Tensors) -> tuple[Tensors, Tensors]:
    """The running averages of gradient and squared gradient, updated."""
    first, second = bucket.state["exp_avg"], bucket.state["exp_avg_sq"]
    lerp_(first, grads, bucket.rows(numbers["first"]))
    scale_(second, bucket.rows(numbers["second_keep"]))
    add_product_(second, grads, grads, bucket.rows(numbers["second"]))
    return first, second


def _shrink(bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
    """Decoupled weight decay."""
    if flags["shrink"]:
        scale_(bucket.params, bucket.rows(numbers["shrink"]))


class _NAdam(Rule):
    """Adam with Nesterov momentum; `mu_product` is the running product of its momentum schedule."""

    numbers = ("lr", "betas", "eps", "weight_decay", "momentum_decay")
    switches = ("maximize", "decoupled_weight_decay")
    counters = ("step", "mu_product")
    first_clock = (0.0, 1.0)
    saved_counters = ("step", "mu_product")
    always = ("exp_avg", "exp_avg_sq")

    @staticmethod
    def _momentum(step: Value, hyper: Mapping[str, Value]) -> Value:
        return hyper["beta1"] * (1.0 - 0.5 * power(0.96, step * hyper["momentum_decay"]))

    def advance(self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]) -> list[Value]:
        step = clock[0] + 1.0
        product, momentum = clock[1], self._momentum(step, hyper)
        if flags["float64_counters"]:
            return [step, product * momentum]
        # torch.optim keeps this product in float32, and 1 - product magnifies the rounding.
        if isinstance(product, Tensor) or isinstance(momentum, Tensor):
            return [step, (_narrow(product) * _narrow(momentum)).double()]  # type: ignore[union-attr]
        return [step, float(np.float32(product) * np.float32(momentum))]

    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        step, product = clock
        following = self._momentum(step + 1.0, hyper)
        correction = root(1.0 - power(hyper["beta2"], step))
        size = -hyper["lr"] * correction
        return {
            **_moment_numbers(hyper, flags),
            "eps": hyper["eps"] * correction,
            "gradient_size": size * (1.0 - self._momentum(step, hyper)) / (1.0 - product),
            "average_size": size * following / (1.0 - product * following),
        }

    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        grads = bucket.gradients(flags, numbers["decay"])
        first, second = _moments(bucket, numbers, grads)
        scale = torch._foreach_sqrt(second)
        add_(scale, bucket.rows(numbers["eps"]))
        _shrink(bucket, numbers, flags)
        add_quotient_(bucket.params, grads, scale, bucket.rows(numbers["gradient_size"]))
        add_quotient_(bucket.params, first, scale, bucket.rows(numbers["average_size"]))


def _narrow(value: Value) -> Value:
    """A number rounded to float32."""
    return value.float() if isinstance(value, Tensor) else float(np.float32(value))


class _RAdam(Rule):
    """Rectified Adam: plain momentum until the variance of the second moment is tractable."""

    numbers = ("lr", "betas", "eps", "weight_decay")
    switches = ("maximize", "decoupled_weight_decay")
    always = ("exp_avg", "exp_avg_sq")
    masks = frozenset({"tractable"})

    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        step, beta2 = clock[0], hyper["beta2"]
        decayed = power(beta2, step)
        limit = 2.0 / (1.0 - beta2) - 1.0
        length = limit - 2.0 * step * decayed / (1.0 - decayed)
        plain = -hyper["lr"] / (1.0 - power(hyper["beta1"], step))

        def rectified() -> Value:
            ratio = (length - 4.0) * (length - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * length)
            return plain * root((1.0 - decayed) * ratio)

        numbers = {**_moment_numbers(hyper, flags), "eps": hyper["eps"], "tractable": length > 5.0}
        if isinstance(length, Tensor):
            numbers["size"] = choose(length > 5.0, rectified(), plain)
        else:
            numbers["size"] = rectified() if length > 5.0 else plain
        return numbers

    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        first, second = _moments(bucket, numbers, bucket.gradients(flags, numbers["decay"]))
        _shrink(bucket, numbers, flags)
        size, tractable = bucket.rows(numbers["size"]), numbers["tractable"]
        if tractable is False:
            add_scaled_(bucket.params, first, size)
        else:
            scale: Tensors = torch._foreach_sqrt(second)
            add_(scale, bucket.rows(numbers["eps"]))
            if tractable is not True:
                scale = bucket.where(tractable, scale, 1.0)
            add_quotient_(bucket.params, first, scale, size)


class _Adamax(Rule):
    """Adam with the infinity norm."""

    numbers = ("lr", "betas", "eps", "weight_decay")
    always = ("exp_avg", "exp_inf")

    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        return {
            "decay": hyper["weight_decay"],
            "first": 1.0 - hyper["beta1"],
            "norm_keep": hyper["beta2"],
            "eps": hyper["eps"],
            "size": -hyper["lr"] / (1.0 - power(hyper["beta1"], clock[0])),
        }

    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        grads = bucket.gradients(flags, numbers["decay"])
        first = bucket.state["exp_avg"]
        lerp_(first, grads, bucket.rows(numbers["first"]))
        norm = bucket.state["exp_inf"]
        scale_(norm, bucket.rows(numbers["norm_keep"]))
        size = torch._foreach_abs(grads)
        add_(size, bucket.rows(numbers["eps"]))
        torch._foreach_maximum_(norm, size)
        add_quotient_(bucket.params, first, norm, bucket.rows(numbers["size"]))


class _RMSprop(Rule):
    """Gradients divided by a running root mean square, optionally centered and with momentum."""

    numbers = ("lr", "alpha", "eps", "weight_decay", "momentum")
    switches = ("centered", "maximize")
    always = ("square_avg",)
    optional: ClassVar[Mapping[str, str]] = {"momentum_buffer": "momentum", "grad_avg": "centered"}
    masks = frozenset({"with_momentum"})

    def flags(self, columns: Mapping[str, Sequence[float]], switches: Mapping[str, bool]) -> dict[str, bool]:
        return {**super().flags(columns, switches), **_momentum_flags(columns["momentum"])}

    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        numbers: dict[str, Any] = {
            "decay": hyper["weight_decay"],
            "keep": hyper["alpha"],
            "new": 1.0 - hyper["alpha"],
            "eps": hyper["eps"],
            "momentum": hyper["momentum"],
            "lr": -hyper["lr"],
        }
        if flags["some_without"]:
            numbers["with_momentum"] = hyper["momentum"].ne(0)  # type: ignore[union-attr]
        return numbers

    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        grads = bucket.gradients(flags, numbers["decay"])
        square = bucket.state["square_avg"]
        scale_(square, bucket.rows(numbers["keep"]))
        add_product_(square, grads, grads, bucket.rows(numbers["new"]))
        if flags["centered"]:
            average = bucket.state["grad_avg"]
            lerp_(average, grads, bucket.rows(numbers["new"]))
            scale = torch._foreach_addcmul(square, average, average, value=-1.0)
            torch._foreach_sqrt_(scale)
        else:
            scale = torch._foreach_sqrt(square)
        add_(scale, bucket.rows(numbers["eps"]))
        if flags["momentum"]:
            direction = self._momentum_step(bucket, numbers, flags, grads, scale)
            add_scaled_(bucket.params, direction, bucket.rows(numbers["lr"]))
        else:
            add_quotient_(bucket.params, grads, scale, bucket.rows(numbers["lr"]))

    @staticmethod
    def _momentum_step(
        bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool], grads: Tensors, scale: Tensors
    ) -> Tensors:
        buffers = bucket.state["momentum_buffer"]
        before = [buffer.clone() for buffer in buffers] if flags["some_without"] else buffers
        scale_(buffers, bucket.rows(numbers["momentum"]))
        quotient = torch._foreach_div(grads, scale)
        torch._foreach_add_(buffers, quotient)
        if not flags["some_without"]:
            return buffers
        direction = bucket.where(numbers["with_momentum"], buffers, quotient)
        copy_(buffers, bucket.where(numbers["with_momentum"], buffers, before))
        return direction


class _Adagrad(Rule):
    """Gradients divided by the root of the sum of their squares."""

    numbers = ("lr", "lr_decay", "weight_decay", "eps")
    always = ("sum",)
    initial: ClassVar[Mapping[str, str]] = {"sum": "initial_accumulator_value"}

    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        return {
            "decay": hyper["weight_decay"],
            "eps": hyper["eps"],
            "size": -hyper["lr"] / (1.0 + (clock[0] - 1.0) * hyper["lr_decay"]),
        }

    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        grads = bucket.gradients(flags, numbers["decay"])
        total = bucket.state["sum"]
        torch._foreach_addcmul_(total, grads, grads)
        scale = torch._foreach_sqrt(total)
        add_(scale, bucket.rows(numbers["eps"]))
        add_quotient_(bucket.params, grads, scale, bucket.rows(numbers["size"]))


class _Adadelta(Rule):
    """Step sizes from running averages of squared gradients and squared steps."""

    numbers = ("lr", "rho", "eps", "weight_decay")
    always = ("square_avg", "acc_delta")

    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        return {
            "decay": hyper["weight_decay"],
            "keep": hyper["rho"],
            "new": 1.0 - hyper["rho"],
            "eps": hyper["eps"],
            "lr": -hyper["lr"],
        }

    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        grads = bucket.gradients(flags, numbers["decay"])
        keep, weight, eps = (bucket.rows(numbers[name]) for name in ("keep", "new", "eps"))
        square = bucket.state["square_avg"]
        scale_(square, keep)
        add_product_(square, grads, grads, weight)
        step = [one.clone() for one in bucket.state["acc_delta"]]
        add_(step, eps)
        torch._foreach_sqrt_(step)
        scale = [one.clone() for one in square]
        add_(scale, eps)
        torch._foreach_sqrt_(scale)
        torch._foreach_div_(step, scale)
        torch._foreach_mul_(step, grads)
        squared_steps = bucket.state["acc_delta"]
        scale_(squared_steps, keep)
        add_product_(squared_steps, step, step, weight)
        add_scaled_(bucket.params, step, bucket.rows(numbers["lr"]))


RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: _SGD(),
    torch.optim.Adam: _Adam(),
    torch.optim.AdamW: _Adam(),
    torch.optim.NAdam: _NAdam(),
    torch.optim.RAdam: _RAdam(),
    torch.optim.Adamax: _Adamax(),
    torch.optim.RMSprop: _RMSprop(),
    torch.optim.Adagrad: _Adagrad(),
    torch.optim.Adadelta: _Adadelta(),
}
