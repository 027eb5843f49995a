"""Tensors that a forward pass leaves on a module: the weight that a hook computed, features kept for later.

Such a tensor belongs to one pass. After a pass under vmap it stands for all models at once and can be neither copied,
pickled nor compiled; after a pass of one model the next model would take it for its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Parameters, buffers, submodules and hooks, which every module has, are not plain attributes.
_TABLES = frozenset(vars(nn.Module()))


class Leftovers:
    """Tells what forward passes left on a model from what was there before, and puts placeholders in its place.

    A placeholder is a tensor on the meta device: computing with it raises, or gives a tensor without values.

    Args:
        module: The model, before any forward pass whose results are to be forgotten.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.scale = torch.ones(2)
        >>> leftovers = Leftovers(model)
        >>> model.features = torch.randn(3, 2)
        >>> leftovers.forget(), model.features.device, model.scale.device
        (True, device(type='meta'), device(type='cpu'))
        >>> model.features = torch.randn(3, 2)
        >>> leftovers.reset()
        >>> leftovers.forget(), model.features.device
        (False, device(type='meta'))
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        # Kept, not only their ids: the id of a tensor that is gone may be given to a new one.
        self._known = {id(tensor): tensor for _, _, tensors in self._plain_tensors() for tensor in tensors}
        self._places: dict[tuple[nn.Module, str], Tensor] = {}

    def forget(self) -> bool:
        """Search the model and replace each new tensor; takes some microseconds per submodule.

        Returns:
            Whether there was any.
        """
        found = False
        for module, name, tensors in self._plain_tensors():
            if any(self._is_new(tensor) for tensor in tensors):
                value = pytree.tree_map(self._placeholder, vars(module)[name])
                vars(module)[name] = value
                if isinstance(value, Tensor):
                    self._places[module, name] = value
                found = True
        return found

    def reset(self) -> None:
        """Replace the tensors of those attributes where `forget` has found one before; free if there are none.

        It can be part of a function that torch.compile traces, and has to be where hooks compute weights: a tensor
        of a pass must not outlive the traced function. Lists and dicts of tensors are left to `forget`.
        """
        for (module, name), placeholder in self._places.items():
            setattr(module, name, placeholder)

    def _plain_tensors(self) -> list[tuple[nn.Module, str, list[Tensor]]]:
        """Attributes that hold tensors: the owner, the name, and the tensors."""
        return [
            (module, name, tensors)
            for module in self._modules
            for name, value in vars(module).items()
            if name not in _TABLES and isinstance(value, (Tensor, list, tuple, dict))
            if (tensors := [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)])
        ]

    def _is_new(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and id(leaf) not in self._known and not leaf.is_meta

    def _placeholder(self, leaf: Any) -> Any:
        if not self._is_new(leaf):
            return leaf
        # Never without axes: a 0-dim tensor of any device may be an operand of an in-place operation.
        return torch.empty(leaf.shape or (1,), dtype=leaf.dtype, device="meta")
