"""`nn.AdaptiveLogSoftmaxWithLoss` without looking at targets: every cluster for every row, and the right one kept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.adaptive import _ASMoutput


def dense_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass with all clusters for all rows, in place of PyTorch's, which takes rows by their targets.

    Values, and gradients of clusters that have rows, are PyTorch's. Two things are not:

    * The parameters of a cluster without rows get zeros as their gradient where PyTorch gives them none. An optimizer
      in a loop leaves a parameter without gradient as it is; here its momentum and weight decay go on.
    * A target outside of the classes, where PyTorch raises, makes the row's output and the loss NaN, as everywhere in
      a compiled program. The comparison with PyTorch still raises for the first batch.

    Example:
        >>> layer = torch.nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2])
        >>> forward = dense_forward(type(layer).forward)
        >>> rows, targets = torch.ones(3, 4), torch.tensor([0, 5, 2])
        >>> torch.allclose(forward(layer, rows, targets).output, layer(rows, targets).output)
        True
    """

    def forward(self: Any, input_: Tensor, target_: Tensor) -> Any:
        fits = target_.dim() <= 1 and input_.dim() == target_.dim() + 1 and input_.shape[:-1] == target_.shape
        if not fits:
            # It raises, and says why.
            return plain(self, input_, target_)
        input, target = (input_, target_) if target_.dim() else (input_.unsqueeze(0), target_.unsqueeze(0))
        in_head = torch.where(target < self.shortlist_size, target, 0)
        within = torch.zeros_like(input[:, 0])
        clusters = zip(pairwise(self.cutoffs), self.tail, strict=True)
        for cluster, ((first, last), tail) in enumerate(clusters):
            chosen = (target >= first) & (target < last)
            place = (target - first).clamp(0, last - first - 1)
            own = F.log_softmax(tail(input), dim=1).gather(1, place.unsqueeze(1)).squeeze(1)
            within = torch.where(chosen, own, within)
            in_head = torch.where(chosen, self.shortlist_size + cluster, in_head)
        exists = (target >= 0) & (target < self.n_classes)
        of_head = F.log_softmax(self.head(input), dim=1)
        place = torch.where(exists, in_head, 0)
        output = torch.where(exists, within + of_head.gather(1, place.unsqueeze(1)).squeeze(1), torch.nan)
        loss = (-output).mean()
        return _ASMoutput(output if target_.dim() else output.squeeze(0), loss)

    return forward


def dense_predict(self: Any, input: Tensor) -> Tensor:
    """The most likely class of each row: that of the head, or of all where the head's is a cluster."""
    head = self.head(input)
    best = head.argmax(dim=1)
    return torch.where(best < self.shortlist_size, best, self._get_full_log_prob(input, head).argmax(dim=1))
