"""Splits a batch into parts that run by themselves: chunks that bound memory, groups of models with as many rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mb_torch.errors import InvalidInput
from mb_torch.routed import RoutedTensor, plain
from mb_torch.stacked.arguments import Arguments


@dataclass(frozen=True)
class Plan:
    """Which models run together.

    Attributes:
        num_models: All models, those that do not run included.
        order: Model numbers in the order of the parts, without models that have no rows; None keeps all in order.
        sizes: How many models each part has.
        rows: How many real rows the models of each part have; None where rows play no role.
        padded_rows: Length to which rows are padded; None where rows play no role.
    """

    num_models: int
    order: Tensor | None
    sizes: list[int]
    rows: list[int | None]
    padded_rows: int | None = None

    def split(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Each part's share of stacks ``[num_models, ...]``: views if the order is kept, else copies."""
        columns = [self._ordered(tensor).split(self.sizes) for tensor in tensors]
        return [[column[part] for column in columns] for part in range(len(self.sizes))]

    def split_vector(self, values: Tensor | None) -> list[Tensor | None]:
        """Each part's share of one value per model ``[num_models]``, or of nothing."""
        return [None] * len(self.sizes) if values is None else list(self._ordered(values).split(self.sizes))

    def split_arguments(self, arguments: Arguments) -> list[Arguments]:
        """Each part's share of what has a model axis, of routed tensors only the real rows; all of the rest."""
        columns = [
            self._split_leaf(leaf) if mapped else [plain(leaf)] * len(self.sizes)
            for leaf, mapped in zip(arguments.leaves, arguments.mapped, strict=True)
        ]
        return [arguments.with_leaves([column[part] for column in columns]) for part in range(len(self.sizes))]

    def _split_leaf(self, leaf: Tensor) -> list[Tensor]:
        pieces = self._ordered(plain(leaf)).split(self.sizes)
        if isinstance(leaf, RoutedTensor) and self.padded_rows is not None:
            return [piece[:, :rows] for piece, rows in zip(pieces, self.rows, strict=True)]
        return list(pieces)

    def join(self, parts: Sequence[Sequence[Tensor]], *, row_wise: bool = True) -> list[Tensor]:
        """Put the parts' tensors together; models that did not run get zeros.

        With ``row_wise``, tensors that have one entry per real row become routed tensors, padded with zeros.
        """
        return [self._join_column(column, row_wise) for column in zip(*parts, strict=True)]

    def _join_column(self, column: tuple[Tensor, ...], row_wise: bool) -> Tensor:
        row_wise = (
            row_wise
            and self.padded_rows is not None
            and all(piece.dim() >= 2 and piece.shape[1] == rows for piece, rows in zip(column, self.rows, strict=True))
        )
        if row_wise:
            column = tuple(_pad_rows(piece, self.padded_rows) for piece in column)  # type: ignore[arg-type]
        joined = torch.cat(column)
        if self.order is not None:
            empty = joined.new_zeros((self.num_models, *joined.shape[1:]))
            joined = empty.index_copy(0, self.order.to(joined.device), joined)
        if row_wise:
            counts = [0] * self.num_models
            models = range(self.num_models) if self.order is None else self.order.tolist()
            per_model = [rows for rows, size in zip(self.rows, self.sizes, strict=True) for _ in range(size)]
            for model, rows in zip(models, per_model, strict=True):
                counts[model] = rows or 0
            return RoutedTensor.wrap(joined, tuple(counts))
        return joined

    def write_back(self, stacks: Sequence[Tensor], parts: Sequence[Sequence[Tensor]]) -> None:
        """Bring what the parts' copies hold back into the stacks."""
        if self.order is None:
            return
        for stack, column in zip(stacks, zip(*parts, strict=True), strict=True):
            stack.index_copy_(0, self.order.to(stack.device), torch.cat(column))

    def _ordered(self, tensor: Tensor) -> Tensor:
        return tensor if self.order is None else tensor.index_select(0, self.order.to(tensor.device))


def plan_parts(num_models: int, chunk_size: int | None, arguments: Arguments) -> Plan | None:
    """Decide which models run together; None if all do.

    Models with different numbers of real rows never share a part, so no padded row is ever computed with: whatever
    the model does across rows, batch statistics included, is exact.

    Args:
        num_models: How many models there are.
        chunk_size: At most so many run together; None is no bound.
        arguments: What the models get; routed tensors among them tell the real rows.
    """
    limit = chunk_size or num_models
    rows = arguments.rows
    if rows is None and limit >= num_models:
        return None
    padded_rows = arguments.padded_rows
    if rows is None or all(count == padded_rows for count in rows):
        sizes = _pieces(num_models, limit)
        return None if len(sizes) == 1 else Plan(num_models, None, sizes, [None] * len(sizes))
    if len(rows) != num_models:
        raise InvalidInput("routed rows", received=f"{len(rows)} models", expected=f"{num_models} models")
    order = sorted((model for model in range(num_models) if rows[model]), key=lambda model: rows[model])
    sizes, counts = [], []
    for count, group in itertools.groupby(order, key=lambda model: rows[model]):
        pieces = _pieces(len(list(group)), limit)
        sizes += pieces
        counts += [count] * len(pieces)
    in_order = order == list(range(num_models))
    return Plan(num_models, None if in_order else torch.tensor(order), sizes, list(counts), padded_rows)


def _pieces(count: int, limit: int) -> list[int]:
    return [min(limit, count - start) for start in range(0, count, limit)]


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((tensor.shape[0], missing, *tensor.shape[2:]))], dim=1)
