"""A function of one model, which a backend runs for every model of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mb_torch.stacked.definition import Definition
from mb_torch.stacked.packing import Packing


class Trace(NamedTuple):
    """What the last run of a model showed besides tensors.

    Attributes:
        packing: The form of the result.
        replaced: For each definition, the positions of the buffers that the forward pass replaced.
        drew: Whether random numbers were drawn from the model's stream.
    """

    packing: Packing
    replaced: list[list[int]]
    drew: bool


class OneModel:
    """A function of one model (of each definition).

    Args:
        definitions: The definitions whose prototypes the function gets.
        body: ``body(*prototypes, *trees)``, the work of one model; returns a pytree.

    Attributes:
        trace: What the last run showed; None before the first.
    """

    def __init__(self, definitions: Sequence[Definition], body: Callable[..., Any]) -> None:
        self.definitions = list(definitions)
        self.body = body
        self.trace: Trace | None = None

    def call(self, tensors: Sequence[Sequence[Tensor]], trees: tuple[Any, ...]) -> tuple[Any, list[dict[int, Tensor]]]:
        """Run one model.

        Args:
            tensors: For each definition, one model's tensors.
            trees: What ``body`` gets after the prototypes.

        Returns:
            What ``body`` returned, and for each definition the buffers that were replaced, by position.
        """
        for definition, own in zip(self.definitions, tensors, strict=True):
            definition.bind(own)
        try:
            result = self.body(*(definition.prototype for definition in self.definitions), *trees)
        finally:
            replaced = [d.unbind(own) for d, own in zip(self.definitions, tensors, strict=True)]
        return result, replaced

    def refuse_backward_hooks(self) -> None:
        """Raise `RuntimeError` if a submodule has backward hooks."""
        for definition in self.definitions:
            definition.refuse_backward_hooks()
