"""Batches as rows of a data set."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def rows_of(inputs: Any, targets: Any, rows: Tensor, shared_input: bool, shared_targets: bool) -> tuple[Any, Any]:
    """Return one batch: the given rows ``[batch]`` of every tensor, along the axis after that of the models if any.

    Example:
        >>> import torch
        >>> rows_of(torch.arange(4), torch.arange(8).view(2, 4), torch.tensor([3, 0]), True, False)
        (tensor([3, 0]), tensor([[3, 0],
                [7, 4]]))
    """

    def taken(tree: Any, axis: int) -> Any:
        return pytree.tree_map_only(Tensor, lambda data: data.index_select(axis, rows.to(data.device)), tree)

    return taken(inputs, 0 if shared_input else 1), taken(targets, 0 if shared_targets else 1)
