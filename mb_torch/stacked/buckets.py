"""Lists of stacks and the operations that update rules are made of.

A stack holds one parameter of all models: ``[num_models, ...]``. The coefficients of an operation are one
float for all models, or rows ``[num_models, 1, ...]`` with a value per model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

Value = float | Tensor
"""One number for all models, or a float64 tensor ``[num_models]``."""

Rows = float | list[Tensor] | tuple[Tensor, ...]
"""A `Value` ready for a list of stacks: a float, or for each stack a tensor ``[num_models, 1, ...]``."""

Tensors = list[Tensor] | tuple[Tensor, ...]


def scale_(xs: Tensors, factor: Rows) -> None:
    """`x *= factor`."""
    torch._foreach_mul_(xs, factor)


def add_(xs: Tensors, number: Rows) -> None:
    """`x += number`."""
    torch._foreach_add_(xs, number)


def add_scaled_(xs: Tensors, ys: Tensors, factor: Rows) -> None:
    """`x += factor * y`."""
    if isinstance(factor, float):
        torch._foreach_add_(xs, ys, alpha=factor)
    else:
        torch._foreach_addcmul_(xs, ys, factor)


def add_product_(xs: Tensors, ys: Tensors, zs: Tensors, factor: Rows) -> None:
    """`x += factor * y * z`, multiplied in this order as `torch.addcmul` does."""
    if isinstance(factor, float):
        torch._foreach_addcmul_(xs, ys, zs, value=factor)
    else:
        torch._foreach_addcmul_(xs, torch._foreach_mul(ys, factor), zs)


def add_quotient_(xs: Tensors, ys: Tensors, zs: Tensors, factor: Rows) -> None:
    """`x += factor * (y / z)`."""
    # Not addcdiv, which rounds otherwise with a float than with rows.
    add_scaled_(xs, torch._foreach_div(ys, zs), factor)


def lerp_(xs: Tensors, ys: Tensors, weight: Rows) -> None:
    """`x += weight * (y - x)`."""
    if isinstance(weight, float):
        torch._foreach_lerp_(xs, ys, weight)
    elif xs[0].dtype != weight[0].dtype:
        # torch.lerp does not promote, and rows are float32 where stacks are half precision.
        for x, y, row in zip(xs, ys, weight, strict=True):
            x.copy_(x.to(row.dtype).lerp_(y.to(row.dtype), row))
    elif torch.compiler.is_compiling():
        # The compiler joins this with what comes before and after, the list form not.
        for x, y, row in zip(xs, ys, weight, strict=True):
            x.lerp_(y, row)
    else:
        torch._foreach_lerp_(xs, ys, weight)


def copy_(xs: Tensors, ys: Tensors) -> None:
    """`x = y`, in place."""
    for x, y in zip(xs, ys, strict=True):
        x.copy_(y)


def power(base: Value, exponent: Value) -> Value:
    """`base ** exponent`, with the same bits for a model whether it is a float or one of several.

    libm and the vectorised loops of torch differ in the last bit; numpy has one function for every length.
    """
    if isinstance(base, float) and isinstance(exponent, float):
        return float(np.power(np.array([base]), np.array([exponent]))[0])
    if isinstance(base, float):
        base = torch.full_like(exponent, base)  # type: ignore[arg-type]
    elif isinstance(exponent, float):
        exponent = torch.full_like(base, exponent)
    if base.device.type != "cpu":
        return torch.pow(base, exponent)
    return torch.from_numpy(np.power(base.numpy(), exponent.numpy()))  # type: ignore[union-attr]


def root(value: Value) -> Value:
    """The square root."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def choose(condition: Tensor, chosen: Value, other: Value) -> Tensor:
    """`torch.where` on `Value`s; floats stay float64."""

    def wide(value: Value) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=torch.float64, device=condition.device)

    return torch.where(condition, wide(chosen), wide(other))


def as_rows(values: Collection[Value], num_models: int, device: torch.device) -> Tensor:
    """Several `Value`s as one float64 tensor ``[count, num_models]``, without waiting for the device."""
    if device.type == "cpu":
        rows = np.empty((len(values), num_models))
        for row, value in enumerate(values):
            rows[row] = value.numpy() if isinstance(value, Tensor) else value
        return torch.from_numpy(rows)
    full = functools.partial(torch.full, (num_models,), dtype=torch.float64, device=device)
    return torch.stack([value.double() if isinstance(value, Tensor) else full(value) for value in values])


def spread(values: Tensor, tensors: Tensors) -> Tensors:
    """``[num_models]`` as one view ``[num_models, 1, ...]`` for each of the tensors."""
    views = {ndim: values.view(-1, *[1] * (ndim - 1)) for ndim in {tensor.ndim for tensor in tensors}}
    return [views[tensor.ndim] for tensor in tensors]


class Bucket:
    """Some stacks of one dtype and device, updated together.

    Args:
        params: Stacks ``[num_models, ...]``, or the part `models` of one stack.
        grads: Their gradients; never written to.
        state: The optimizer's state tensors by name, aligned with `params`.
        models: The models concerned, a slice of all; None for all.
    """

    def __init__(
        self, params: Tensors, grads: Tensors, state: Mapping[str, Tensors], models: slice | None = None
    ) -> None:
        self.params = params
        self.grads = grads
        self.state = state
        self.models = models
        like = params[0]
        full = self.is_full_precision()
        # In half precision 0.999 would round to 1, so rows of numbers stay float32 there, as scalars in torch.
        self.row_dtype = like.dtype if full else torch.float32
        alone = models is None and like.shape[0] == 1
        self.takes_floats = full and (alone or like.device.type == "cpu")

    def is_full_precision(self) -> bool:
        """Whether the parameters are float32 or float64."""
        return self.params[0].dtype in (torch.float32, torch.float64)

    def is_contiguous(self) -> bool:
        """Whether every tensor lies in memory without gaps or another order of axes."""
        return all(tensor.is_contiguous() for tensor in (*self.grads, *self.tensors()))

    def spread(self, values: Tensor) -> Tensors:
        """``[num_models]`` as one view ``[num_models, 1, ...]`` for each stack."""
        return spread(values if self.models is None else values[self.models], self.params)

    def rows(self, value: Value) -> Rows:
        """A coefficient as rows in the parameters' dtype, or as a float where that gives the same bits.

        A number that one model changes turns from a float into rows, and that must not change a bit of another
        model. With full precision on a CPU it does not; other kernels round a number otherwise than a row.
        """
        if isinstance(value, Tensor):
            return self.spread(value.to(self.row_dtype))
        if self.takes_floats:
            return value
        like = self.params[0]
        return spread(torch.full(like.shape[:1], value, dtype=self.row_dtype, device=like.device), self.params)

    def where(self, models: Tensor, chosen: Tensors, others: Tensors | float) -> Tensors:
        """Take `chosen` for the models, bool ``[num_models]``, and `others` elsewhere."""
        rows = self.spread(models)
        if isinstance(others, float):
            return [torch.where(row, one, others) for row, one in zip(rows, chosen, strict=True)]
        return [torch.where(row, one, other) for row, one, other in zip(rows, chosen, others, strict=True)]

    def tensors(self) -> Tensors:
        """Everything that an update changes."""
        return [*self.params, *(tensor for tensors in self.state.values() for tensor in tensors)]

    def gradients(self, flags: Mapping[str, bool], decay: Value) -> Tensors:
        """Gradients to descend along: negated for `maximize`, with the L2 penalty's gradient added."""
        grads = self.grads
        if flags["maximize"]:
            grads = torch._foreach_neg(grads)
        if flags["penalty"]:
            factor = self.rows(decay)
            if isinstance(factor, float):
                return torch._foreach_add(grads, self.params, alpha=factor)
            grads = torch._foreach_addcmul(grads, self.params, factor)
            return [grad.to(param.dtype) for grad, param in zip(grads, self.params, strict=True)]
        return grads
