"""Results of a model taken apart into tensors and the rest."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.trees import put_together, take_apart

_CONSTANTS = (type(None), bool, int, float, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)


class Packing(NamedTuple):
    """How a pytree was taken apart: its structure and, for each leaf, the leaf itself if it is no tensor."""

    structure: pytree.TreeSpec | None
    constants: list[Any]

    @property
    def has_numbers(self) -> bool:
        """Whether a Python number is among the leaves."""
        return any(isinstance(leaf, (int, float)) and not isinstance(leaf, bool) for leaf in self.constants)

    def unpack(self, tensors: Sequence[Tensor]) -> Any:
        """Put a pytree together again from its tensors."""
        remaining = iter(tensors)
        leaves = [next(remaining) if constant is _TENSOR else constant for constant in self.constants]
        return put_together(leaves, self.structure)


_TENSOR = object()


def pack(tree: Any) -> tuple[list[Tensor], Packing]:
    """Take a pytree apart into its tensors and the rest.

    Raises:
        Unsupported: A leaf is an object that may hide tensors.
    """
    leaves, structure = take_apart(tree)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            raise Unsupported(
                f"a model returned a {type(leaf).__name__}, which may hold tensors out of reach",
                fix="Return tensors, tuples, lists or dicts, or register the class with torch.utils._pytree.",
            )
    constants = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], Packing(structure, constants)


def check_loss(loss: Any) -> Tensor:
    """Return the loss of one model if it is one number.

    Raises:
        InvalidInput: The loss has another form; per-row losses, say.
    """
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    received = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise InvalidInput(
        "the loss function must return one value per model",
        received=received,
        expected="a 0-dim tensor for each model",
        fix="Reduce over the rows, for example with reduction='mean'.",
    )
