"""Runs the one definition of a batch with any model's tensors put in place of its placeholders.

This is ``torch.func.functional_call`` with the look-ups done once: the prototype belongs to the batch, so tensors can
be written straight into its submodules' tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from mb_torch.errors import Unsupported
from mb_torch.stacked.leftovers import Leftovers
from mb_torch.state import StackedState


class Definition:
    """A prototype on the meta device, and the places where its tensors go.

    Args:
        prototype: One model on the meta device.
        state: The stacks that go with it.
    """

    def __init__(self, prototype: nn.Module, state: StackedState) -> None:
        self.prototype = prototype
        self.state = state
        self.num_parameters = len(state.parameters)
        position = {name: i for i, name in enumerate(state.tensors)}
        # A submodule used under two names has its tensors in one place.
        slots: dict[tuple[int, str], tuple[dict[str, Any], str, int]] = {}
        for name, first in state.names.items():
            path, _, leaf = name.rpartition(".")
            owner = prototype.get_submodule(path)
            table = owner._parameters if leaf in owner._parameters else owner._buffers
            slots[id(table), leaf] = (table, leaf, position[first])
        self._slots = list(slots.values())
        self._placeholders = [table[leaf] for table, leaf, _ in self._slots]
        self._modules = list(prototype.modules())
        self._leftovers = Leftovers(prototype)

    def stacks(self) -> list[Tensor]:
        """The live stacks, parameters first, in the order that `bind` expects."""
        return [*self.state.parameters.values(), *self.state.buffers.values()]

    def buffers(self) -> list[Tensor]:
        """The live stacked buffers, in the order of `stacks`."""
        return list(self.state.buffers.values())

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Put one model's tensors (or, under vmap, all models') in place of the placeholders."""
        for table, leaf, position in self._slots:
            table[leaf] = tensors[position]

    def unbind(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        """Put the placeholders back; return the buffers that the forward pass replaced, by position."""
        replaced: dict[int, Tensor] = {}
        refused = []
        for (table, leaf, position), placeholder in zip(self._slots, self._placeholders, strict=True):
            current = table.get(leaf)
            table[leaf] = placeholder
            if current is not tensors[position]:
                if position < self.num_parameters or current is None:
                    refused.append(leaf)
                else:
                    replaced[position] = current
        if torch.compiler.is_compiling():
            self._leftovers.reset()
        else:
            self._leftovers.forget()
        if refused:
            raise Unsupported(f"forward() replaced or removed {refused}; only buffers may be replaced, by tensors")
        return replaced

    def refuse_backward_hooks(self) -> None:
        """Raise `RuntimeError` if a submodule has backward hooks, which no vectorised pass runs."""
        for module in self._modules:
            if module._backward_hooks or module._backward_pre_hooks:
                raise RuntimeError(f"{self.module_name(module)} has backward hooks")
        if hooks._global_backward_hooks or hooks._global_backward_pre_hooks:
            raise RuntimeError("there are backward hooks for all modules")

    def module_name(self, module: nn.Module) -> str | None:
        """The name of a submodule of the prototype, with its class; None if it is not one."""
        for name, candidate in self.prototype.named_modules():
            if candidate is module:
                return f"{name or 'the model'} ({type(module).__name__})"
        return None
