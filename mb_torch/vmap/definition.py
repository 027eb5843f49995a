"""A definition whose submodules can be swapped for classes that vmap can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mb_torch.stacked.definition import Definition
from mb_torch.state import StackedState
from mb_torch.vmap.layers import find_gaps


class BatchableDefinition(Definition):
    """A `Definition` that closes what vmap cannot run.

    Args:
        prototype: One model on the meta device.
        state: The stacks that go with it.
    """

    def __init__(self, prototype: nn.Module, state: StackedState) -> None:
        super().__init__(prototype, state)
        self._gaps = find_gaps(prototype)

    @property
    def has_gaps(self) -> bool:
        """Whether `batchable` changes anything."""
        return bool(self._gaps)

    @contextmanager
    def batchable(self) -> Iterator[None]:
        """Within the block, submodules that vmap cannot run are of classes that it can."""
        for gap in self._gaps:
            gap.module.__class__ = gap.batchable
        try:
            yield
        finally:
            for gap in self._gaps:
                gap.module.__class__ = gap.plain
