"""Which model sees which rows of a batch: routing by masks or indices, balanced subsets, random subsets."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from mb_torch.errors import InvalidInput
from mb_torch.routed import RoutedTensor, with_rows
from mb_torch.row_tracking import Rows

MODES = ("passthrough", "mask", "indices")
STRATEGIES = ("round_robin", "random", "class_based")

Batch = TypeVar("Batch")


class Routed(NamedTuple):
    """Inputs and targets routed together.

    Attributes:
        inputs: The routed inputs, `[num_models, max_subset, ...]` (`[batch, ...]` in passthrough mode).
        targets: The routed targets, likewise.
        weights: `[num_models, max_subset]`, 1 for real rows and 0 for padding; `None` in passthrough mode.

    Example:
        >>> router, rows = DataRouter("indices"), [[0, 1], [2]]
        >>> router.route_batch(torch.arange(3.0), indices=rows, targets=torch.arange(3)).weights
        tensor([[1., 1.],
                [1., 0.]])
    """

    inputs: Any
    targets: Any
    weights: Tensor | None


class DataRouter:
    """Routes the rows of a batch to models, by boolean masks or by row numbers.

    Models that get fewer rows than others are padded. The result is then a `RoutedTensor`, which knows the
    real rows of each model; `ModelBatch` leaves the rest out of losses, gradients and statistics. Padding
    repeats the model's first row (row 0 of the batch for a model without rows), so that it holds values of
    the usual range. Routed batches need ``ModelBatch(models, shared_input=False)``.

    Models with equally many rows run together. Every other number of rows is a pass of its own, so that no padding
    is ever computed with: 16 models with 16 different numbers of rows take longer than one after another. Give models
    equally many rows where you can.

    Args:
        mode: `"passthrough"` (every model gets the batch as it is), `"mask"` or `"indices"`.

    Raises:
        InvalidInput: The mode is unknown.

    Example:
        >>> router = DataRouter(mode="indices")
        >>> routed = router.route_batch(torch.tensor([10, 11, 12]), indices=[[2, 0], [1]])
        >>> routed.tolist(), routed.rows
        ([[12, 10], [11, 11]], (2, 1))
    """

    def __init__(self, mode: str = "passthrough") -> None:
        if mode not in MODES:
            raise InvalidInput("unknown routing mode", received=repr(mode), expected=_any_of(MODES))
        self.mode = mode

    @overload
    def route_batch(
        self,
        batch: Batch,
        masks: Masks | None = None,
        indices: Indices | None = None,
        *,
        targets: None = None,
    ) -> Batch: ...

    @overload
    def route_batch(
        self, batch: Any, masks: Masks | None = None, indices: Indices | None = None, *, targets: Any
    ) -> Routed: ...

    def route_batch(
        self,
        batch: Any,
        masks: Masks | None = None,
        indices: Indices | None = None,
        *,
        targets: Any = None,
    ) -> Any:
        """Give every model its rows of the batch.

        Args:
            batch: `[batch, ...]`, or a pytree of such tensors of the same batch size.
            masks: In mode `"mask"`: one bool mask `[batch]` per model, or a tensor `[num_models, batch]`.
            indices: In mode `"indices"`: the row numbers of each model, as an integer tensor `[subset]` or a
                list of integers, or a tensor `[num_models, subset]` for all. A row may occur any number of
                times.
            targets: `[batch, ...]`, or a pytree like the batch, to be routed together with it.

        Returns:
            The batch itself in passthrough mode, else `[num_models, max_subset, ...]`: a `RoutedTensor` where
            rows were padded, a plain tensor where all models have the same number of rows. With targets, a
            `Routed(inputs, targets, weights)`. Gradients flow back into the batch.

        Raises:
            InvalidInput: Masks or indices do not belong to the mode, are missing, have the wrong type or
                shape, are out of range, or leave every model without rows; or the batch holds no tensors of
                one size.

        Example:
            >>> router = DataRouter(mode="mask")
            >>> masks = [torch.tensor([True, True, False]), torch.tensor([False, False, True])]
            >>> inputs, targets, weights = router.route_batch(torch.eye(3), masks, targets=torch.arange(3))
            >>> targets.tolist(), weights.tolist()
            ([[0, 1], [2, 2]], [[1.0, 1.0], [1.0, 0.0]])
        """
        self._check_selection(masks, indices)
        if self.mode == "passthrough":
            return batch if targets is None else Routed(batch, targets, None)
        batch_size, device = _size_and_device(batch, targets)
        if self.mode == "mask":
            models, positions, counts = _from_masks(masks, batch_size, device)
        else:
            models, positions, counts = _from_indices(indices, batch_size, device)
        rows: Rows = tuple(counts.tolist())
        if not any(rows):
            raise InvalidInput(
                "no model gets any row",
                received=f"{self._selection_name} that are empty for all {len(rows)} models",
                fix="Give at least one model a row.",
            )
        table = _padded_table(models, positions, counts, max(rows))

        def take(leaf: Tensor) -> Tensor:
            chosen = leaf.index_select(0, table.flatten().to(leaf.device))
            return with_rows(chosen.reshape(*table.shape, *leaf.shape[1:]), rows)

        inputs = tree_map(take, batch)
        if targets is None:
            return inputs
        weights = torch.arange(max(rows), device=device) < counts[:, None]
        return Routed(inputs, tree_map(take, targets), weights.to(torch.get_default_dtype()))

    @property
    def _selection_name(self) -> str:
        return "masks" if self.mode == "mask" else self.mode

    def _check_selection(self, masks: object, indices: object) -> None:
        given = [name for name, value in (("masks", masks), ("indices", indices)) if value is not None]
        wanted = [] if self.mode == "passthrough" else [self._selection_name]
        if given != wanted:
            raise InvalidInput(
                f'route_batch in mode "{self.mode}"',
                received=" and ".join(given) or "neither masks nor indices",
                expected=" and ".join(wanted) or "neither masks nor indices",
                fix="Choose the mode when the router is made: DataRouter(mode=...).",
            )


class StratifiedRouter(DataRouter):
    """Deals the rows of every class out to the models, so that all see the same mixture; routes by indices.

    In every strategy the number of rows of a class differs by at most one between models, and so does the
    total.

    * `"round_robin"`: rows are dealt to the models in turn, class by class, the deal continuing from one
      class to the next. Every row goes to exactly one model; the result depends on the labels only.
    * `"random"`: likewise, but which rows of a class a model gets, and which models get a row more, is
      random.
    * `"class_based"`: every model sees every class that is present. As `"round_robin"`, but a class with
      fewer rows than models is dealt again from its start until each model has one of its rows.

    Args:
        num_models: Number of models, at least 1.
        strategy: One of the three.

    Raises:
        InvalidInput: The strategy is unknown, or there is no model.

    Example:
        >>> router = StratifiedRouter(num_models=2)
        >>> labels = torch.tensor([0, 1, 0, 1, 0, 1])
        >>> [rows.tolist() for rows in router.create_stratified_indices(labels)]
        [[0, 3, 4], [1, 2, 5]]
    """

    def __init__(self, num_models: int, strategy: str = "round_robin") -> None:
        super().__init__(mode="indices")
        if strategy not in STRATEGIES:
            raise InvalidInput("unknown strategy", received=repr(strategy), expected=_any_of(STRATEGIES))
        self.num_models = _at_least_one("num_models", num_models)
        self.strategy = strategy

    def create_stratified_indices(
        self, labels: Tensor, num_classes: int | None = None, *, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Choose the rows of each model by their labels.

        Args:
            labels: `[batch]`, integer class numbers.
            num_classes: If given, labels must be smaller.
            generator: Source of randomness for `"random"`, torch's global CPU generator by default; the other
                strategies use none.

        Returns:
            One `[subset]` int64 tensor of ascending row numbers per model, on the labels' device. With fewer
            rows than models some are empty (except for `"class_based"`); `route_batch` accepts that.

        Raises:
            InvalidInput: Labels are empty, not one-dimensional, not integers or out of range.

        Example:
            >>> router = StratifiedRouter(num_models=3, strategy="class_based")
            >>> [rows.tolist() for rows in router.create_stratified_indices(torch.tensor([0, 1, 0, 0]))]
            [[0, 1], [1, 2], [1, 3]]
        """
        _check_labels(labels, num_classes)
        models = torch.arange(self.num_models, device=labels.device)
        if self.strategy == "random":
            shuffled = _shuffled(len(labels), generator).to(labels.device)
            deal = shuffled[labels[shuffled].argsort(stable=True)]
            models = _shuffled(self.num_models, generator).to(labels.device)
        else:
            deal = labels.argsort(stable=True)
        if self.strategy == "class_based":
            deal = _repeat_small_classes(deal, labels, self.num_models)
        hands = [deal[start :: self.num_models].sort().values for start in range(self.num_models)]
        return [hands[model] for model in models.tolist()]


StratifiedDataRouter = StratifiedRouter


def create_random_masks(
    batch_size: int,
    num_models: int,
    subset_ratio: float = 0.8,
    *,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Choose a random subset of the batch for each model, without replacement, independently of the others.

    Args:
        batch_size: Number of rows.
        num_models: Number of masks.
        subset_ratio: Share of the rows that each model sees, above 0 and up to 1. The number of rows is the
            product rounded down, at least 1; products within rounding error of a whole number count as that
            number (0.29 of 100 rows are 29).
        generator: Source of randomness, torch's global CPU generator by default; the masks are on its device.

    Returns:
        One bool mask `[batch_size]` per model, all with the same number of true values.

    Raises:
        InvalidInput: A size is below 1, or the ratio is not in (0, 1].

    Example:
        >>> [int(mask.sum()) for mask in create_random_masks(10, num_models=2)]
        [8, 8]
    """
    batch_size = _at_least_one("batch_size", batch_size)
    num_models = _at_least_one("num_models", num_models)
    if not 0 < subset_ratio <= 1:
        raise InvalidInput("impossible subset_ratio", received=subset_ratio, expected="a number in (0, 1]")
    product = batch_size * subset_ratio
    nearest = round(product)
    whole = nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.floor(product)
    device = generator.device if generator is not None else torch.device("cpu")
    order = torch.rand(num_models, batch_size, generator=generator, device=device).argsort(1)
    masks = torch.zeros(num_models, batch_size, dtype=torch.bool, device=device)
    return list(masks.scatter_(1, order[:, : max(1, whole)], True).unbind())


Masks = Sequence[Tensor] | Tensor
Indices = Sequence[Tensor] | Sequence[Sequence[int]] | Tensor


def _any_of(names: Sequence[str]) -> str:
    return "one of " + ", ".join(repr(name) for name in names)


def _at_least_one(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InvalidInput(f"impossible {name}", received=repr(value), expected="an integer of at least 1")
    return number


def _size_and_device(batch: Any, targets: Any) -> tuple[int, torch.device]:
    """The common batch size of all leaves, and the device of the first."""
    named = [("batch", batch)] if targets is None else [("batch", batch), ("targets", targets)]
    leaves = [(name + keystr(path), leaf) for name, tree in named for path, leaf in tree_flatten_with_path(tree)[0]]
    if not leaves:
        raise InvalidInput("nothing to route", received="no tensors", expected="tensors [batch, ...]")
    for name, leaf in leaves:
        if isinstance(leaf, RoutedTensor):
            raise InvalidInput(f"{name} is already routed", received=f"real rows {leaf.rows}")
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            raise InvalidInput(f"{name} cannot be routed", received=_described(leaf), expected="a tensor [batch, ...]")
        first_name, first = leaves[0]
        if len(leaf) != len(first):
            raise InvalidInput(
                f"{name} and {first_name} have different batch sizes",
                received=f"{len(leaf)} and {len(first)}",
                expected="the same number of rows in every tensor",
            )
    return len(leaves[0][1]), leaves[0][1].device


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return type(value).__name__


def _one_per_model(name: str, selection: Any) -> list[Any]:
    """The items of a list (or the slices of a matrix) of masks or indices."""
    sliceable = isinstance(selection, Tensor) and selection.ndim == 2
    if not sliceable and (isinstance(selection, Tensor | str) or not isinstance(selection, Sequence)):
        raise InvalidInput(
            f"{name} have the wrong type",
            received=_described(selection),
            expected="a list with one tensor per model, or a tensor [num_models, ...]",
        )
    items = list(selection)
    if not items:
        raise InvalidInput(f"{name} are empty", received="an empty list", expected="one item per model")
    return items


def _from_masks(masks: Any, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Model and row numbers of all selected rows, sorted by both, and the number of rows per model."""
    checked = []
    for model, mask in enumerate(_one_per_model("masks", masks)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch_size,):
            raise InvalidInput(
                f"model {model}: the mask does not fit the batch",
                received=_described(mask),
                expected=f"bool of shape {[batch_size]}",
            )
        checked.append(mask.to(device))
    stacked = torch.stack(checked)
    models, positions = stacked.nonzero(as_tuple=True)
    return models, positions, stacked.sum(1)


def _from_indices(indices: Any, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Model and row numbers of all selected rows in the order given, and the number of rows per model."""
    checked = [_row_numbers(model, item, device) for model, item in enumerate(_one_per_model("indices", indices))]
    counts = torch.tensor([len(item) for item in checked], device=device)
    models = torch.arange(len(checked), device=device).repeat_interleave(counts)
    positions = torch.cat(checked)
    outside = (positions < 0) | (positions >= batch_size)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise InvalidInput(
            f"model {int(models[first])}: row number out of range",
            received=int(positions[first]),
            expected=f"0 to {batch_size - 1}, for a batch of {batch_size} rows",
        )
    return models, positions, counts


def _row_numbers(model: int, item: Any, device: torch.device) -> Tensor:
    if isinstance(item, Sequence) and len(item) == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    try:
        numbers = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _bad_indices(model, type(item).__name__) from error
    if _is_not_integer(numbers) or numbers.ndim != 1:
        raise _bad_indices(model, _described(numbers))
    return numbers.to(device=device, dtype=torch.int64)


def _bad_indices(model: int, received: str) -> InvalidInput:
    return InvalidInput(
        f"model {model}: indices are not row numbers",
        received=received,
        expected="a one-dimensional integer tensor or a list of integers",
    )


def _is_not_integer(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def _padded_table(models: Tensor, positions: Tensor, counts: Tensor, longest: int) -> Tensor:
    """`[num_models, longest]`: the row numbers of each model, then its first again (row 0 if it has none)."""
    starts = counts.cumsum(0) - counts
    within = torch.arange(len(models), device=models.device) - starts[models]
    firsts = positions[starts.clamp(max=len(positions) - 1)].where(counts > 0, 0)
    table = firsts[:, None].repeat(1, longest)
    table[models, within] = positions
    return table


def _check_labels(labels: Any, num_classes: int | None) -> None:
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.numel() == 0 or _is_not_integer(labels):
        raise InvalidInput(
            "labels cannot be stratified",
            received=_described(labels),
            expected="a non-empty, one-dimensional integer tensor",
        )
    below = None if num_classes is None else _at_least_one("num_classes", num_classes)
    wrong = labels < 0 if below is None else (labels < 0) | (labels >= below)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise InvalidInput(
            f"row {row}: label out of range",
            received=int(labels[row]),
            expected="0 or more" if below is None else f"0 to {below - 1}, for num_classes={below}",
        )


def _shuffled(count: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randperm(count, generator=generator, device=device)


def _repeat_small_classes(deal: Tensor, labels: Tensor, num_models: int) -> Tensor:
    """Extend each class, in a deal ordered by class, to at least one row per model by starting it again."""
    sizes = torch.unique_consecutive(labels[deal], return_counts=True)[1]
    lengths = sizes.clamp(min=num_models)
    class_of = torch.arange(len(sizes), device=labels.device).repeat_interleave(lengths)
    within = torch.arange(len(class_of), device=labels.device) - (lengths.cumsum(0) - lengths)[class_of]
    return deal[(sizes.cumsum(0) - sizes)[class_of] + within % sizes[class_of]]
