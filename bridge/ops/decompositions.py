"""Which operations PyTorch takes apart itself before they are lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

aten = torch.ops.aten

# Lowered as they are: their parts are slower, less exact, more to compile, or without a finite slope where the whole
# has one. PyTorch differentiates the whole, JAX would differentiate the parts.
_KEPT = (
    aten.addmm,
    aten.baddbmm,
    aten.im2col,
    aten.col2im,
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten.grid_sampler_2d,
    aten.grid_sampler_3d,
    aten.nll_loss_forward,
    aten.nll_loss2d_forward,
    aten.logsumexp,
    aten._log_softmax,
    aten._softmax,
    aten.gelu,
    aten.silu,
    aten.var,
    aten.std,
    aten.var_mean,
    aten.std_mean,
    aten.softplus,
    aten.mish,
    aten.celu,
    aten.hardsigmoid,
    aten.hardswish,
    aten.softshrink,
    aten.hardshrink,
    aten.log_sigmoid_forward,
    aten._safe_softmax,
    aten.binary_cross_entropy,
    aten.huber_loss,
    aten.smooth_l1_loss,
    aten.soft_margin_loss,
    aten.xlogy,
    aten.special_xlog1py,
    aten.special_log_ndtr,
    aten.sinc,
    aten.logaddexp,
    aten.logaddexp2,
    aten.hypot,
    aten.dist,
    aten.index_fill,
    aten.take,
    # Their parts count negative positions from the end.
    aten.index_add,
    aten.index_copy,
    # Their parts count a class for every place of a list that has ended.
    aten.multilabel_margin_loss_forward,
    aten.multi_margin_loss,
)


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's own table for its core operations, without those that have a better lowering of their own."""
    kept = {overload for packet in _KEPT for overload in _overloads(packet)}
    table = {op: function for op, function in core_aten_decompositions().items() if op not in kept}
    table[aten.native_batch_norm.default] = _native_batch_norm
    return table


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """The form whose schema says that running statistics change; of `native_batch_norm` the schema is silent."""
    if running_mean is None:
        return aten._native_batch_norm_legit.no_stats(input, weight, bias, training, momentum, eps)
    if not training:
        return aten._native_batch_norm_legit_no_training(input, weight, bias, running_mean, running_var, momentum, eps)
    return aten._native_batch_norm_legit(input, weight, bias, running_mean, running_var, training, momentum, eps)
