"""Tensors that a forward pass leaves on a module: the weight that a hook computed, features kept for later.

Such a tensor belongs to one pass. After a pass under vmap it stands for all models at once and can be neither copied,
pickled nor compiled; after a pass of one model the next model would take it for its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mb_torch.errors import Unsupported

# Parameters, buffers, submodules and hooks, which every module has, are not plain attributes.
_TABLES = frozenset(vars(nn.Module()))

# What tells the form of a tensor only; attributes such as shape are named __get__. torch.compile asks for the rest.
_HARMLESS = frozenset(
    "__get__ __repr__ dim size numel stride storage_offset untyped_storage is_conj is_neg _is_view".split()
)


class Forgotten(Tensor):
    """Stands, without values, where a forward pass left a tensor; raises when it is computed with."""

    @staticmethod
    def of(shape: torch.Size, dtype: torch.dtype) -> Forgotten:
        """Return a placeholder of that form, on the meta device."""
        return torch.empty(shape, dtype=dtype, device="meta").as_subclass(Forgotten)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the form be looked at; refuse everything else."""
        if func.__name__ not in _HARMLESS:
            raise Unsupported(
                "forward() reads a tensor that an earlier forward pass left on a module as a plain attribute",
                fix="Register what has to outlive a pass with register_buffer.",
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Forgotten:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Forgotten.of, (self.shape, self.dtype)


class Leftovers:
    """Tells what forward passes left on a model from what was there before, and puts placeholders in its place.

    Args:
        module: The model, before any forward pass whose results are to be forgotten.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.scale = torch.ones(2)
        >>> leftovers = Leftovers(model)
        >>> model.features = torch.randn(3, 2)
        >>> leftovers.forget(), model.features.shape, type(model.features).__name__, type(model.scale).__name__
        (True, torch.Size([3, 2]), 'Forgotten', 'Tensor')
        >>> model.features = torch.randn(3, 2)
        >>> leftovers.reset()
        >>> leftovers.forget(), type(model.features).__name__
        (False, 'Forgotten')
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        # Kept, not only their ids: the id of a tensor that is gone may be given to a new one.
        self._known = {id(tensor): tensor for _, _, tensors in self._plain_tensors() for tensor in tensors}
        self._places: dict[tuple[nn.Module, str], Forgotten] = {}

    def forget(self) -> bool:
        """Search the model and replace each new tensor; takes some microseconds per submodule.

        Returns:
            Whether there was any.
        """
        found = False
        for module, name, tensors in self._plain_tensors():
            if any(self._is_new(tensor) for tensor in tensors):
                value = self._replaced(vars(module)[name], set())
                vars(module)[name] = value
                if isinstance(value, Forgotten):
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
            for name in vars(module).keys() - _TABLES
            if isinstance(value := vars(module)[name], (Tensor, list, tuple, dict))
            if (tensors := _tensors_in(value))
        ]

    def _is_new(self, leaf: Any) -> bool:
        # A recurrent layer lists its parameters, which are on the meta device between passes.
        return isinstance(leaf, Tensor) and id(leaf) not in self._known and not leaf.is_meta

    def _replaced(self, value: Any, seen: set[int]) -> Any:
        """The value with placeholders for new tensors; lists and dicts stay the same objects."""
        if self._is_new(value):
            return Forgotten.of(value.shape, value.dtype)
        if id(value) in seen:
            return value
        seen.add(id(value))
        if isinstance(value, dict):
            value.update({key: self._replaced(item, seen) for key, item in value.items()})
        elif isinstance(value, list):
            value[:] = [self._replaced(item, seen) for item in value]
        elif isinstance(value, tuple):
            items = [self._replaced(item, seen) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers, which may contain themselves."""
    found: list[Tensor] = []
    seen: set[int] = set()
    remaining = [value]
    while remaining:
        item = remaining.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)) and id(item) not in seen:
            seen.add(id(item))
            remaining.extend(item.values() if isinstance(item, dict) else item)
    return found
