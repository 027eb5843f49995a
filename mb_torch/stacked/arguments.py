"""The arguments of a function of one model, given for all models and taken apart once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mb_torch.routed import RoutedTensor
from mb_torch.row_tracking import Rows, common_rows
from mb_torch.trees import put_together, take_apart


class Arguments:
    """Pytrees of tensors, some of which have a leading model axis.

    Walking a pytree costs as much as a small layer; questions about the leaves are answered from one walk.

    Args:
        trees: The arguments.
        per_model: For each of them, whether its tensors have a leading model axis.

    Attributes:
        leaves: All leaves in a row.
        mapped: For each leaf, whether it is a tensor with a leading model axis.
        structures: For each argument its form; None for a single leaf.

    Example:
        >>> import torch
        >>> arguments = Arguments(({"x": torch.zeros(2, 3)}, torch.ones(3)), (True, False))
        >>> arguments.mapped, arguments.of_model(1)[0]["x"].shape
        ([True, False], torch.Size([3]))
    """

    def __init__(self, trees: Sequence[Any], per_model: Sequence[bool]) -> None:
        leaves, mapped, structures = [], [], []
        for tree, flag in zip(trees, per_model, strict=True):
            own_leaves, structure = take_apart(tree)
            leaves += own_leaves
            mapped += [flag and isinstance(leaf, Tensor) for leaf in own_leaves]
            structures.append(structure)
        self._set(leaves, mapped, structures)
        self._trees: tuple[Any, ...] | None = tuple(trees)

    def _set(self, leaves: list[Any], mapped: list[bool], structures: list[Any]) -> None:
        self.leaves = leaves
        self.mapped = mapped
        self.structures = structures
        self._routed = [leaf for leaf in leaves if isinstance(leaf, RoutedTensor)]
        self._trees = None

    def with_leaves(self, leaves: Sequence[Any]) -> Arguments:
        """Return arguments of the same structure."""
        others = object.__new__(Arguments)
        others._set(list(leaves), self.mapped, self.structures)
        return others

    @property
    def trees(self) -> tuple[Any, ...]:
        """The arguments, put together."""
        if self._trees is None:
            self._trees = self._joined(self.leaves)
        return self._trees

    def _joined(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        trees, first = [], 0
        for structure in self.structures:
            count = 1 if structure is None else structure.num_leaves
            trees.append(put_together(leaves[first : first + count], structure))
            first += count
        return tuple(trees)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The shape of every tensor; None for other leaves."""
        return tuple(leaf.shape if isinstance(leaf, Tensor) else None for leaf in self.leaves)

    @property
    def dims(self) -> tuple[int | None, ...]:
        """The ``in_dims`` of vmap for each leaf."""
        return tuple(0 if mapped else None for mapped in self.mapped)

    @property
    def rows(self) -> Rows | None:
        """The real rows of the routed tensors; None if there are none.

        Raises:
            InvalidInput: They disagree.
        """
        return common_rows(self._routed)

    @property
    def padded_rows(self) -> int:
        """The length to which routed tensors are padded."""
        return max((leaf.shape[1] for leaf in self._routed), default=0)

    @property
    def num_models(self) -> int:
        """The length of the model axis; there must be a tensor that has one."""
        return next(len(leaf) for leaf, mapped in zip(self.leaves, self.mapped, strict=True) if mapped)

    def plain(self) -> Arguments:
        """Routed tensors without their rows."""
        if not self._routed:
            return self
        return self.with_leaves([leaf.plain() if isinstance(leaf, RoutedTensor) else leaf for leaf in self.leaves])

    def of_model(self, index: int) -> tuple[Any, ...]:
        """One model's share of each argument."""
        if not any(self.mapped):
            return self.trees
        pairs = zip(self.leaves, self.mapped, strict=True)
        return self._joined([leaf[index] if mapped else leaf for leaf, mapped in pairs])

    def own_copies(self, *, only_shared: bool = False) -> Arguments:
        """Copies of the tensors (with ``only_shared`` of the shared ones): a model may change its inputs."""
        # A tensor that is passed twice stays one tensor.
        copies: dict[int, Tensor] = {}
        leaves = []
        for leaf, mapped in zip(self.leaves, self.mapped, strict=True):
            if isinstance(leaf, Tensor) and not (only_shared and mapped):
                leaf = copies.setdefault(id(leaf), leaf.clone())
            leaves.append(leaf)
        return self.with_leaves(leaves)

    def take_changes(self, copies: Arguments) -> None:
        """Do to the tensors what was done in place to their copies."""
        for leaf, copy in zip(self.leaves, copies.leaves, strict=True):
            if not isinstance(leaf, Tensor):
                continue
            # Inference tensors do not count their versions.
            changed = not torch.equal(leaf, copy) if copy.is_inference() else bool(copy._version)
            if changed:
                leaf.copy_(copy)

    def versions(self) -> list[int]:
        """Counts that grow when a tensor is changed in place; inference tensors have none."""
        return [leaf._version for leaf in self.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
