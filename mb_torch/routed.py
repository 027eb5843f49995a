"""Padded data that knows its real rows.

Models may be routed different numbers of rows. Their rows then travel in one padded tensor
`[num_models, max_subset, ...]`, and whatever averages over rows has to leave the padding out. A
`RoutedTensor` carries the number of real rows of every model with the data, through the usual preparation
(`.to(device)`, `/ 255`, `.flatten(2)`, slicing), up to the batch of models that consumes it.

Which results of which operations have which rows is decided in `row_tracking`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mb_torch.errors import InvalidInput
from mb_torch.row_tracking import Call, Rows, real_rows
from mb_torch.trees import leaves_of


class RoutedTensor(Tensor):
    """A padded tensor `[num_models, max_subset, ...]` of which model i's real rows are `[i, :rows[i]]`.

    It is an ordinary tensor in every other respect: it moves between devices, takes part in autograd, can be
    copied and pickled. Results of operations that treat every row apart are routed again; results that only
    move data (slices, `tensor[[2, 0]]`, `split`, `flatten(2)`) get the rows that are theirs, or are plain
    tensors if all of those are real. All others are plain. Reductions over rows (`.mean()`, a loss called by
    hand) see the
    padding: weigh them with `weights`, or leave the loss to `ModelBatch.compute_loss`. Merging the first two
    dimensions (`flatten(0, 1)`) gives a plain tensor.

    `torch.save` stores the rows too, but `torch.load(weights_only=True)` refuses the class: save `plain()`
    and `rows` where that matters. Operations that could move rows in place (`transpose_`) raise
    `InvalidInput`, as do operations on two routed tensors with different rows.

    Args:
        tensor: `[num_models, max_subset, ...]`; the memory is shared, not copied.
        rows: Number of real rows per model, each between 0 and `max_subset`.

    Raises:
        InvalidInput: The tensor has fewer than two dimensions, or the rows do not fit it.

    Example:
        >>> padded = RoutedTensor(torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]), (3, 1))
        >>> (padded * 10).rows
        (3, 1)
        >>> padded[:, :2].rows
        (2, 1)
        >>> type(padded.sum()).__name__
        'Tensor'
    """

    rows: Rows

    def __new__(cls, tensor: Tensor, rows: Iterable[int]) -> RoutedTensor:
        """Check the rows and attach them."""
        return _attach(plain(tensor), _checked_rows(tensor, rows))

    @classmethod
    def wrap(cls, tensor: Tensor, rows: Iterable[int]) -> RoutedTensor:
        """Return `tensor` with its rows, checked: the same as calling the class."""
        return cls(tensor, rows)

    @property
    def weights(self) -> Tensor:
        """`[num_models, max_subset]` in the default float dtype: 1 for real rows, 0 for padding."""
        counts = torch.tensor(self.rows, device=self.device)
        return real_rows(counts, self.size(1)).to(torch.get_default_dtype())

    def plain(self) -> Tensor:
        """Return the same data, sharing memory and autograd history, as a `torch.Tensor` without rows."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RoutedTensor({self.plain()!r}, rows={self.rows})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.plain().detach(), self.rows, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedTensor:
        if not self.is_leaf:
            raise InvalidInput(
                "a RoutedTensor that is the result of a differentiable operation cannot be deep-copied",
                fix="Copy tensor.detach(), or use tensor.clone() to stay differentiable.",
            )
        duplicate = _rebuild(copy.deepcopy(self.plain().detach(), memo), self.rows, self.requires_grad)
        if self.grad is not None:
            duplicate.grad = copy.deepcopy(self.grad, memo)
        return duplicate

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        call = Call(func, tuple(args), dict(kwargs or {}), routed_leaves((args, kwargs)))
        call.check()
        result = _run(call, types)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not tensors:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            rows = dict(zip(map(id, tensors), call.rows_of_results(tensors), strict=True))
        inputs = {id(leaf) for leaf in tree_leaves((call.args, call.kwargs))}

        def rewrapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) in inputs or type(leaf) is not Tensor:
                return leaf
            leaf_rows = rows[id(leaf)]
            return leaf if leaf_rows is None else with_rows(leaf, leaf_rows)

        return tree_map(rewrapped, result)


def with_rows(tensor: Tensor, rows: Rows) -> Tensor:
    """Return a `RoutedTensor`, or `tensor` itself (plain) if every row of every model is real.

    Args:
        tensor: `[num_models, max_subset, ...]`.
        rows: Number of real rows per model; not checked.
    """
    return plain(tensor) if all(count == tensor.shape[1] for count in rows) else _attach(plain(tensor), rows)


def plain(tensor: Tensor) -> Tensor:
    """Return `tensor` without rows if it is a `RoutedTensor` (sharing memory), unchanged otherwise."""
    return tensor.plain() if isinstance(tensor, RoutedTensor) else tensor


def strip(pytree: Any) -> Any:
    """Return the pytree with every `RoutedTensor` replaced by its plain tensor; other leaves are unchanged.

    Example:
        >>> type(strip({"x": RoutedTensor(torch.zeros(2, 3), (3, 1))})["x"]).__name__
        'Tensor'
    """
    return tree_map_only(RoutedTensor, RoutedTensor.plain, pytree)


def rows_from_weights(weights: Tensor) -> Rows | None:
    """Turn weights of rows into numbers of real rows.

    Args:
        weights: `[num_models, max_subset]` of any dtype, 1 for real rows and 0 for padding, real rows first.

    Returns:
        The number of real rows per model, `None` if all rows are real.

    Raises:
        InvalidInput: A value is neither 0 nor 1, or a real row follows padding.

    Example:
        >>> rows_from_weights(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
        (2, 1)
    """
    if not isinstance(weights, Tensor) or weights.ndim != 2:
        raise InvalidInput(
            "row weights have the wrong shape",
            received=_described(weights),
            expected="a tensor [num_models, max_subset]",
        )
    values = plain(weights).detach()
    real = values == 1
    _reject_weights(values, ~(real | (values == 0)), "is neither 0 nor 1", "Scale the losses, not the rows.")
    counts = real.sum(1)
    _reject_weights(
        values,
        real & ~real_rows(counts, values.shape[1]),
        "marks a real row that comes after padding",
        "Put the real rows of each model first.",
    )
    rows = tuple(counts.tolist())
    return None if all(count == values.shape[1] for count in rows) else rows


def _reject_weights(values: Tensor, wrong: Tensor, problem: str, fix: str) -> None:
    if wrong.any():
        model, position = wrong.nonzero()[0].tolist()
        value = values[model, position].item()
        raise InvalidInput(f"model {model}: the row weight at position {position} {problem}", received=value, fix=fix)


def _checked_rows(tensor: Tensor, rows: Iterable[int]) -> Rows:
    if not isinstance(tensor, Tensor) or tensor.ndim < 2:
        raise InvalidInput(
            "only padded tensors can be routed",
            received=_described(tensor),
            expected="a tensor [num_models, max_subset, ...]",
        )
    try:
        checked = tuple(operator.index(count) for count in rows)
    except TypeError as error:
        raise InvalidInput("rows are not integers", received=rows, expected="one integer per model") from error
    num_models, max_subset = tensor.shape[:2]
    if len(checked) != num_models:
        raise InvalidInput(
            "wrong number of rows",
            received=f"{len(checked)} for {num_models} models",
            expected="one per model",
        )
    for model, count in enumerate(checked):
        if not 0 <= count <= max_subset:
            raise InvalidInput(
                f"model {model}: impossible number of real rows",
                received=count,
                expected=f"0 to {max_subset}, the padded length",
            )
    return checked


def _described(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _attach(tensor: Tensor, rows: Rows) -> RoutedTensor:
    routed = tensor.as_subclass(RoutedTensor)
    routed.rows = rows
    return routed


def _rebuild(tensor: Tensor, rows: Rows, requires_grad: bool) -> RoutedTensor:
    # A wrapper of a tensor that requires a gradient would not be a leaf, so gradients are asked for last.
    return _attach(tensor.detach(), rows).requires_grad_(requires_grad)  # type: ignore[return-value]


def routed_leaves(pytree: Any) -> list[RoutedTensor]:
    """Return the routed tensors in a pytree."""
    return [leaf for leaf in leaves_of(pytree) if isinstance(leaf, RoutedTensor)]


def _run(call: Call, types: Sequence[type]) -> Any:
    if all(issubclass(kind, RoutedTensor) or kind in (Tensor, Parameter) for kind in types):
        # The operands themselves go in: a plain alias would not be the leaf that autograd knows.
        with torch._C.DisableTorchFunctionSubclass():
            return call.func(*call.args, **call.kwargs)
    # Other tensor classes must see the operation too, so only our own are taken out of it.
    return call.func(*strip(call.args), **strip(call.kwargs))
