"""Tensors that a forward pass leaves on a module: the weight that a hook computed, features kept for later.

Such a tensor belongs to one pass. After a pass under vmap it stands for all models at once and can be neither copied,
pickled nor compiled; after a pass of one model it would be read by the next model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Parameters, buffers, submodules and hooks, which every module has, are not plain attributes.
_TABLES = frozenset(vars(nn.Module()))


class Leftovers:
    """Tells what a forward pass left on a model from what was there before.

    Args:
        module: The model, before any forward pass whose results are to be forgotten.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.scale = torch.ones(2)
        >>> leftovers = Leftovers(model)
        >>> model.features = [torch.randn(3, 2)]
        >>> leftovers.forget(), model.features[0].device, model.scale.device
        (True, device(type='meta'), device(type='cpu'))
        >>> leftovers.forget()
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        # Kept, not only their ids: the id of a tensor that is gone may be given to a new one.
        self._known = {id(tensor): tensor for _, _, tensors in self._plain_tensors() for tensor in tensors}

    def forget(self) -> bool:
        """Replace each new tensor by a placeholder on the meta device, of the same shape, that fails where it is read.

        Takes about 4 us per submodule.

        Returns:
            Whether there was any.
        """
        found = False
        for attributes, name, tensors in self._plain_tensors():
            if any(self._is_new(tensor) for tensor in tensors):
                attributes[name] = pytree.tree_map(self._placeholder, attributes[name])
                found = True
        return found

    def _plain_tensors(self) -> list[tuple[dict[str, Any], str, list[Tensor]]]:
        """Attributes that hold tensors: the owner's attributes, the name, and the tensors."""
        return [
            (vars(module), name, tensors)
            for module in self._modules
            for name, value in vars(module).items()
            if name not in _TABLES and isinstance(value, (Tensor, list, tuple, dict))
            if (tensors := [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)])
        ]

    def _is_new(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and id(leaf) not in self._known and not leaf.is_meta

    def _placeholder(self, leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if self._is_new(leaf) else leaf
