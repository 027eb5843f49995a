"""The linear layer of many models, with gradients laid out as the stacked weights are.

torch takes ``linear`` under vmap apart into a batched matrix product with the transposed weight. The gradient of that
product is transposed as well: an optimizer then reads it against its grain (1.1 ms instead of 0.4 ms for the moments of
64 layers 64-128), and autograd copies it before it becomes ``.grad``. Here the product for the weight's gradient is
written so that its result lies as the weight does, and the bias is added in place.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from mb_torch.vmap.functorch_state import mapped_models


class StackedLinear(torch.autograd.Function):
    """``inputs @ weight.T + bias`` for every model.

    Args:
        inputs: ``[num_models, rows, in_features]``, or ``[rows, in_features]`` for all models.
        weight: ``[num_models, out_features, in_features]``.
        bias: ``[num_models, out_features]``, or None.

    Returns:
        ``[num_models, rows, out_features]``.

    Example:
        >>> outputs = StackedLinear.apply(torch.ones(5, 4), torch.ones(3, 2, 4), torch.zeros(3, 2))
        >>> outputs.shape, outputs[0, 0].tolist()
        (torch.Size([3, 5, 2]), [4.0, 4.0])
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Only what a gradient needs is kept: the rest may be changed in place, and its memory is free.
        of_inputs, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if of_weight else None, weight if of_inputs else None)
        ctx.shared_inputs = inputs.dim() == 2
        outputs = torch.bmm(_for_each(inputs, len(weight)), weight.mT)
        return outputs if bias is None else outputs.add_(bias.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inputs, weight = ctx.saved_tensors
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0] and ctx.shared_inputs:
            # The sum over models too is part of one product.
            num_models, rows, features = grad.shape
            joined = grad.transpose(0, 1).reshape(rows, num_models * features)
            of_inputs = torch.mm(joined, weight.conj().reshape(num_models * features, weight.shape[2]))
        elif ctx.needs_input_grad[0]:
            of_inputs = torch.bmm(grad, weight.conj())
        if ctx.needs_input_grad[1]:
            of_weight = torch.bmm(grad.mT, _for_each(inputs, len(grad)).conj())
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(1)
        return of_inputs, of_weight, of_bias


def _for_each(inputs: Tensor, num_models: int) -> Tensor:
    return inputs if inputs.dim() == 3 else inputs.expand(num_models, *inputs.shape)


class _Switch(threading.local):
    """Whether a pass of a batch runs in this thread."""

    on = False


_switch = _Switch()


@contextmanager
def stacked_linear() -> Iterator[None]:
    """Within the block, ``linear`` under one vmap is `StackedLinear`; elsewhere it stays what torch makes of it."""
    before, _switch.on = _switch.on, True
    try:
        yield
    finally:
        _switch.on = before


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``torch.nn.functional.linear`` does under torch.func: `StackedLinear` within `stacked_linear`."""
    stacked = _linear_of_stacks(inputs, weight, bias) if _switch.on else None
    if stacked is not None:
        return stacked
    # Otherwise what torch does, written out because the rule that this one replaces cannot be called any more.
    if bias is None:
        return torch.matmul(inputs, weight.t())
    return torch.addmm(bias, inputs, weight.t()) if inputs.dim() == 2 else torch.matmul(inputs, weight.t()) + bias


def _linear_of_stacks(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The result where each model has a weight (and a bias) of its own and only one vmap is in force; else None."""
    if mapped_models() is None or inputs.dim() == 0 or weight.dim() != 2:
        return None
    if bias is not None and bias.dtype != weight.dtype:
        # vmap adds any bias to the product; plain PyTorch refuses.
        raise RuntimeError(f"linear: the weight is {weight.dtype}, the bias {bias.dtype}")
    if forward_ad._current_level >= 0 or (bias is not None and bias.dim() != 1):
        return None
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    rows, rows_axis = _functorch._unwrap_batched(inputs, level)
    weights, weight_axis = _functorch._unwrap_batched(weight, level)
    biases, bias_axis = (None, 0) if bias is None else _functorch._unwrap_batched(bias, level)
    if weight_axis is None or bias_axis is None:
        return None
    with interpreter.lower():
        rows = rows if rows_axis is None else rows.movedim(rows_axis, 0)
        own = () if rows_axis is None else rows.shape[:1]
        rows = rows.reshape(*own, math.prod(inputs.shape[:-1]), rows.shape[-1])
        own_bias = None if biases is None else biases.movedim(bias_axis, 0)
        outputs: Tensor = StackedLinear.apply(rows, weights.movedim(weight_axis, 0), own_bias)
        outputs = outputs.view(len(outputs), *inputs.shape[:-1], weight.shape[0])
        return _functorch._add_batch_dim(outputs, 0, level)
