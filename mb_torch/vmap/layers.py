"""Closes the gaps of ``torch.func`` in the layers of torch.nn: what vmap refuses, or runs model by model.

A submodule whose class has a gap is given, in place, a class that has none. For ``nn.LSTM`` that is our subclass
``BatchableLSTM``; for a user's subclass of it (or the class that `torch.nn.utils.parametrize` makes for an instance)
it is made on the spot with the bases (the user's class, ``BatchableLSTM``), so that our ``forward`` comes right before
that of ``nn.LSTM`` and a user's ``super().forward()`` reaches it. ``isinstance`` holds throughout. Outside of
vmap every such class does what its plain class does. Gaps in single operations are closed in batching_rules.py.

What cannot be closed, because shapes or control flow depend on values: ``nn.AdaptiveLogSoftmaxWithLoss``, boolean
indexing, ``.item()``, ``if`` on a tensor, ``nn.CTCLoss``; ``nn.CrossMapLRN2d`` and other old-style
``autograd.Function``s. Models that use these run one after another.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import mb_torch.vmap.batching_rules  # noqa: F401  registers the rules, once for the process
from mb_torch.vmap.attention import (
    BatchableMultiheadAttention,
    BatchableTransformerEncoder,
    BatchableTransformerEncoderLayer,
)
from mb_torch.vmap.functorch_state import under_vmap
from mb_torch.vmap.recurrent import (
    BatchableGRU,
    BatchableGRUCell,
    BatchableLSTM,
    BatchableLSTMCell,
    BatchableRNN,
    BatchableRNNCell,
)


class BatchableBilinear(nn.Bilinear):
    """`torch.nn.Bilinear` without the detour model by model."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """As in `torch.nn.Bilinear`."""
        if not under_vmap():
            return super().forward(input1, input2)
        product = torch.einsum("...i,oij,...j->...o", input1, self.weight, input2)
        return product if self.bias is None else product + self.bias


class BatchableBatchNorm(_BatchNorm):
    """Batch normalisation whose running statistics are plain averages (``momentum=None``), under vmap too.

    Each model weighs a batch by its own count of batches, which may differ between models.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As in `torch.nn.BatchNorm1d` and its like."""
        cumulative = self.training and self.momentum is None
        running_mean, running_var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if not under_vmap() or not cumulative or running_mean is None or running_var is None or count is None:
            return super().forward(input)
        self._check_input_dim(input)
        # With momentum 1 torch leaves the statistics of this batch, unbiased variance included, in what it is given.
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        output = F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        with torch.no_grad():
            count.add_(1)
            share = count.to(mean.dtype).reciprocal()
            running_mean.mul_(1.0 - share).add_(mean * share)
            running_var.mul_(1.0 - share).add_(var * share)
        return output


class BatchableEmbedding(nn.Embedding):
    """`torch.nn.Embedding` whose gradient is dense under vmap, which knows no sparse ones."""

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        """Whether the gradient is sparse; never under vmap."""
        return False if under_vmap() else self.__dict__["sparse"]


class BatchableEmbeddingBag(nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` without the detour model by model; its gradient is dense under vmap."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As in `torch.nn.EmbeddingBag`."""
        if not under_vmap():
            return super().forward(input, offsets, per_sample_weights)
        if input.dim() == 2:
            num_bags = input.shape[0]
            bags = torch.arange(num_bags, device=input.device).repeat_interleave(input.shape[1])
        else:
            assert offsets is not None  # torch asks for offsets with a flat input
            num_bags = offsets.shape[0] - self.include_last_offset
            places = torch.arange(input.shape[0], device=input.device)
            bags = (offsets.unsqueeze(0) <= places.unsqueeze(1)).sum(1) - 1
        tokens = input.reshape(-1)
        if self.padding_idx is not None:
            # What does not count goes to one more bag, which is left out at the end.
            bags = bags.masked_fill(tokens == self.padding_idx, num_bags)
        rows = F.embedding(
            tokens,
            self.weight,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.reshape(-1, 1)
        return self._reduce(rows, bags, num_bags)[:num_bags]

    def _reduce(self, rows: Tensor, bags: Tensor, num_bags: int) -> Tensor:
        """Join the rows of each bag: ``[num_bags + 1, features]``."""
        empty = rows.new_zeros(num_bags + 1, rows.shape[1])
        if self.mode == "max":
            index = bags.unsqueeze(1).expand(rows.shape)
            return empty.scatter_reduce(0, index, rows, "amax", include_self=False)
        total = empty.index_add(0, bags, rows)
        if self.mode == "sum":
            return total
        counts = rows.new_zeros(num_bags + 1).index_add(0, bags, rows.new_ones(rows.shape[0]))
        return total / counts.clamp(min=1.0).unsqueeze(1)


class BatchableRReLU(nn.RReLU):
    """`torch.nn.RReLU` with slopes drawn by an operation that vmap knows."""

    def forward(self, input: Tensor) -> Tensor:
        """As in `torch.nn.RReLU`."""
        if not under_vmap():
            return super().forward(input)
        if self.training:
            slopes = self.lower + (self.upper - self.lower) * torch.rand_like(input)
        else:
            slopes = torch.full_like(input, (self.lower + self.upper) / 2)
        output = torch.where(input > 0, input, input * slopes)
        return input.copy_(output) if self.inplace else output


_BATCHABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: BatchableLSTM,
    nn.GRU: BatchableGRU,
    nn.RNN: BatchableRNN,
    nn.LSTMCell: BatchableLSTMCell,
    nn.GRUCell: BatchableGRUCell,
    nn.RNNCell: BatchableRNNCell,
    nn.MultiheadAttention: BatchableMultiheadAttention,
    nn.TransformerEncoderLayer: BatchableTransformerEncoderLayer,
    nn.TransformerEncoder: BatchableTransformerEncoder,
    nn.Bilinear: BatchableBilinear,
    nn.EmbeddingBag: BatchableEmbeddingBag,
    nn.Embedding: BatchableEmbedding,
    nn.RReLU: BatchableRReLU,
    _BatchNorm: BatchableBatchNorm,
}
_BATCHABLE_CLASSES = tuple(_BATCHABLE.values())


class Gap(NamedTuple):
    """A submodule that vmap cannot run as it is.

    Attributes:
        module: The submodule.
        plain: Its own class.
        batchable: The class to run it with under vmap.
    """

    module: nn.Module
    plain: type[nn.Module]
    batchable: type[nn.Module]


def find_gaps(module: nn.Module) -> list[Gap]:
    """List the submodules (the module itself included) that vmap cannot run, or runs model by model.

    Args:
        module: The model, in whichever mode; it is not changed.

    Returns:
        One entry per submodule with a gap. Setting ``gap.module.__class__`` to ``gap.batchable`` closes it.

    Example:
        >>> [gap.plain.__name__ for gap in find_gaps(nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2)))]
        ['GRU']
    """
    gaps = []
    for submodule in module.modules():
        plain = type(submodule)
        if not isinstance(submodule, _BATCHABLE_CLASSES) and _has_gap(submodule):
            gaps.append(Gap(submodule, plain, _batchable_class(plain)))
    return gaps


def _has_gap(module: nn.Module) -> bool:
    """Whether this layer with its settings needs another class: what works is left alone."""
    if isinstance(module, _BatchNorm):
        return module.momentum is None
    if isinstance(module, nn.Embedding):
        return module.sparse
    return isinstance(module, tuple(_BATCHABLE))


def _batchable_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class to run a layer with; always the same one for the same class."""
    if plain in _BATCHABLE:
        return _BATCHABLE[plain]
    ours = next(_BATCHABLE[base] for base in plain.__mro__ if base in _BATCHABLE)
    # Classes made before are found through the plain class, which knows its subclasses without keeping them alive.
    for subclass in plain.__subclasses__():
        if subclass.__bases__ == (plain, ours):
            return subclass
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return types.new_class(plain.__name__, (plain, ours), exec_body=lambda namespace: namespace.update(names))
