"""Parts of torch.nn that look at values or hide what they do; while a function is recorded, they are written anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.utils.checkpoint import CheckpointFunction

from bridge.ops.adaptive_softmax import dense_forward, dense_predict
from bridge.ops.functions import record_function

_AdaptiveSoftmax = nn.AdaptiveLogSoftmaxWithLoss


@contextmanager
def recordable() -> Iterator[None]:
    """Within the block, these parts can be recorded."""
    replaced: list[tuple[Any, str, Any]] = [
        (batchnorm._BatchNorm, "forward", _batch_norm_forward(batchnorm._BatchNorm.forward)),
        (F, "_no_grad_embedding_renorm_", _embedding_renorm),
        (nn.CrossMapLRN2d, "forward", _cross_map_norm),
        (_AdaptiveSoftmax, "forward", dense_forward(_AdaptiveSoftmax.forward)),
        (_AdaptiveSoftmax, "predict", dense_predict),
        (torch.autograd.Function, "apply", classmethod(_apply(vars(torch.autograd.Function)["apply"].__func__))),
    ]
    before = [vars(owner)[name] for owner, name, _ in replaced]
    for owner, name, ours in replaced:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name, _), theirs in zip(replaced, before, strict=True):
            setattr(owner, name, theirs)


def _batch_norm_forward(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, input: Tensor) -> Tensor:
        """Plain averages (``momentum=None``) without looking at the count of batches."""
        count = self.num_batches_tracked
        if not self.training or self.momentum is not None or self.running_mean is None or count is None:
            return plain(self, input)
        self._check_input_dim(input)
        # With momentum 1 torch leaves the statistics of this batch in what it is given.
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        output = F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        with torch.no_grad():
            count.add_(1)
            share = count.to(mean.dtype).reciprocal()
            self.running_mean.mul_(1.0 - share).add_(mean * share)
            self.running_var.mul_(1.0 - share).add_(var * share)
        return output

    return forward


def _embedding_renorm(weight: Tensor, input: Tensor, max_norm: float, norm_type: float) -> None:
    # PyTorch detaches the table first; recorded so, the table that follows would have no gradient.
    torch.embedding_renorm_(weight, input, max_norm, norm_type)


class _CrossMapNorm(torch.autograd.Function):
    """What `nn.CrossMapLRN2d` computes forward and backward, without loops that fill tensors.

    Its windows are no neighbourhoods: forward keeps the first channel in all of them, and those of backward are others.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, settings: tuple[int, float, float, float]) -> Tensor:
        size, alpha, beta, k = settings
        windows = _forward_windows(input.shape[1], size).to(input.dtype)
        scale = torch.einsum("cj,nj...->nc...", windows, input.square()) * (alpha / size) + k
        output = scale**-beta * input
        ctx.save_for_backward(input, output, scale)
        ctx.settings = settings
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        input, output, scale = ctx.saved_tensors
        size, alpha, beta, _ = ctx.settings
        windows = _backward_windows(input.shape[1], size).to(input.dtype)
        total = torch.einsum("cj,nj...->nc...", windows, gradient * output / scale)
        return scale**-beta * gradient - (2 * alpha * beta / size) * input * total, None


def _forward_windows(channels: int, size: int) -> Tensor:
    reach = int((size - 1) / 2 + 1)
    rows = [[float(channel < reach) for channel in range(channels)]]
    for channel in range(1, channels):
        row = list(rows[-1])
        if channel < channels - reach + 1:
            row[channel + reach - 1] += 1
        if channel > reach:
            row[channel - reach] -= 1
        rows.append(row)
    return torch.tensor(rows)


def _backward_windows(channels: int, size: int) -> Tensor:
    before = int(size - (size - 1) / 2)
    return torch.tensor(
        [[float(0 <= other + before - channel < size) for other in range(channels)] for channel in range(channels)]
    )


def _cross_map_norm(self: Any, input: Tensor) -> Tensor:
    return record_function(_CrossMapNorm, (input, (self.size, self.alpha, self.beta, self.k)))


def _apply(plain: Callable[..., Any]) -> Callable[..., Any]:
    def apply(function: type[torch.autograd.Function], *arguments: Any, **options: Any) -> Any:
        """Record a user's function with its own backward; PyTorch's functions inside of its operations go on."""
        if issubclass(function, CheckpointFunction):
            # Computing something a second time saves memory; it means the same as computing it once.
            return arguments[0](*arguments[2:])
        if function.__module__.startswith("torch."):
            return plain(function, *arguments, **options)
        return record_function(function, arguments)

    return apply
