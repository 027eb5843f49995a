"""Tensors whose values are known while a function is recorded.

Lengths of sequences decide the shapes of results, so a recording that depends on them is made for their values. A
known tensor is a real one among tensors without values: what is computed from known tensors alone runs for real and is
known as well, and its values may be looked at. Where a known tensor meets others, it is a constant of the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bridge.in_place import changed_arguments
from bridge.ops.random import is_random
from bridge.translation import TensorFunction


def with_known(function: TensorFunction, inputs: Sequence[Tensor], places: Sequence[int]) -> TensorFunction:
    """The function with the values of some inputs known: it may look at them, and serves no others.

    Args:
        function: Takes and returns flat sequences of tensors.
        inputs: Real inputs.
        places: Which of them are known. Integers that are made of plain numbers (``torch.tensor([3, 1])``) are known
            even without any.

    Example:
        >>> from bridge.trace import trace
        >>> double = lambda inputs: [inputs[0] * inputs[1].tolist()[0]]
        >>> inputs = [torch.ones(2), torch.tensor([2])]
        >>> trace(with_known(double, inputs, [1]), inputs).operations[-1].args[1]
        2
    """
    values = {place: inputs[place].detach().cpu().clone() for place in places}

    def specialised(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with KnownValues() as known:
            # Copies: the function may change its inputs in place.
            given = [known.take(values[place]) if place in values else one for place, one in enumerate(tensors)]
            results = function(given)
        return [result.clone() if known.knows(result) else result for result in results]

    return specialised


def known_values(tensor: Tensor) -> Tensor | None:
    """The tensor itself if its values are known, else None."""
    mode = _active.get()
    return tensor if mode is not None and mode.knows(tensor) else None


def remember(tensor: Tensor) -> Tensor:
    """The tensor, whose values are known from now on."""
    mode = _active.get()
    return tensor if mode is None else mode.remember(tensor)


@contextmanager
def for_real() -> Iterator[None]:
    """Within the block operations on real tensors compute at once, whatever is being recorded; drawing raises."""
    with _disable_current_modes(), torch._C._DisableFuncTorch(), _NothingDrawn():
        yield


class _Draws(Exception):
    """An operation would draw random numbers."""


class _NothingDrawn(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_random(func):
            raise _Draws
        return func(*args, **(kwargs or {}))


class WritesKnown(Exception):
    """Values that are not known would be written into a known tensor; the text names the function."""


# What reads memory, which only real tensors have.
_READS_MEMORY = frozenset((Tensor.numpy, Tensor.__array__, Tensor.tolist))
_OF_NUMBERS = frozenset((torch.tensor, torch.as_tensor, torch.arange))
_FACTORIES = frozenset((torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn))
_FACTORIES_LIKE = frozenset("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full".split())
_SHAPED_AS: dict[Any, Any] = {
    Tensor.view_as: Tensor.view,
    Tensor.reshape_as: Tensor.reshape,
    Tensor.expand_as: Tensor.expand,
}
_TAKE_SIZES = frozenset(
    "view reshape expand repeat tile narrow select split unflatten new_zeros new_ones new_empty new_full".split()
)


class KnownValues(TorchFunctionMode):
    """Within the block, what is computed from known tensors alone is computed for real."""

    def __init__(self) -> None:
        super().__init__()
        # By identity; holding the tensors keeps identities their own.
        self._known: dict[int, Tensor] = {}
        self._before: Token[KnownValues | None] | None = None

    def __enter__(self) -> KnownValues:
        self._before = _active.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._before is not None
        _active.reset(self._before)

    def take(self, values: Tensor) -> Tensor:
        """A known tensor with these values."""
        with for_real():
            return self.remember(values.clone())

    def remember(self, tensor: Tensor) -> Tensor:
        """The tensor, whose values are known from now on."""
        self._known[id(tensor)] = tensor
        return tensor

    def knows(self, value: Any) -> bool:
        """Whether something is a tensor whose values are known."""
        return id(value) in self._known

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPED_AS:
            # Only the shape of the other tensor matters, which is always known.
            func, args = _SHAPED_AS[func], (args[0], args[1].shape)
        tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _FACTORIES:
            # Their results may be filled with what is not known.
            return func(*self._as_numbers(args), **self._as_numbers(kwargs))
        if all(map(self.knows, tensors)) and (tensors or func in _OF_NUMBERS) and not _makes_floats(func, args, kwargs):
            try:
                return self._computed(func, args, kwargs, made=not tensors)
            except _Draws:
                pass
        if any(map(self.knows, changed_arguments(func, args, kwargs))):
            raise WritesKnown(getattr(func, "__name__", func))
        # The recording keeps its constants by reference, and a known tensor may still be changed in place.
        args, kwargs = pytree.tree_map(lambda leaf: self.take(leaf) if self.knows(leaf) else leaf, (args, kwargs))
        if _makes_floats(func, args, kwargs):
            # Of a known tensor PyTorch would make one that the recording could not write to.
            args = (torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:])
        if func in _REWRITTEN:
            return _REWRITTEN[func](self, func, *args, **kwargs)
        if getattr(func, "__name__", "") in _TAKE_SIZES:
            args, kwargs = self._as_numbers(args), self._as_numbers(kwargs)
        return func(*args, **kwargs)

    def _computed(self, func: Callable[..., Any], args: Any, kwargs: Any, *, made: bool) -> Any:
        with for_real():
            if func in _READS_MEMORY:
                with torch._C.DisableTorchFunction():
                    return func(*args, **kwargs)
            result = func(*args, **kwargs)
        if isinstance(result, Iterator):
            return iter([self.remember(part) for part in result])
        if made and result.is_floating_point():
            return func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, self.remember, result)

    def _as_numbers(self, tree: Any) -> Any:
        """Known integers of no dimension as plain numbers, where PyTorch would look at them."""
        return pytree.tree_map(self._as_number, tree)

    def _as_number(self, value: Any) -> Any:
        if isinstance(value, slice):
            return slice(*map(self._as_number, (value.start, value.stop, value.step)))
        if not self.knows(value) or value.dim() or value.is_floating_point():
            return value
        with for_real():
            return value.item()

    def index(self, index: Any) -> Any:
        """An index as positions: known masks as where they are true, known numbers as numbers."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if self.knows(part) and part.dtype == torch.bool and part.dim():
                with for_real():
                    parts += map(self.remember, part.nonzero(as_tuple=True))
            else:
                parts.append(self._as_number(part))
        return tuple(parts)


_active: ContextVar[KnownValues | None] = ContextVar("known values", default=None)


def _makes_floats(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is a new tensor of floats, to be filled with what is not known."""
    if getattr(func, "__name__", "") not in _FACTORIES_LIKE or not args:
        return False
    dtype = kwargs.get("dtype") or args[0].dtype
    return bool(dtype.is_floating_point or dtype.is_complex)


def _leaves(tree: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(tree):
        yield from (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)


# Functions whose results have shapes that follow from known tensors, in terms of others.


def _get(mode: KnownValues, func: Callable[..., Any], tensor: Tensor, index: Any) -> Any:
    return func(tensor, mode.index(index))


def _set(mode: KnownValues, func: Callable[..., Any], tensor: Tensor, index: Any, value: Any) -> Any:
    return func(tensor, mode.index(index), value)


def _repeat(
    mode: KnownValues,
    func: Callable[..., Any],
    input: Tensor,
    repeats: Any,
    dim: int | None = None,
    *,
    output_size: int | None = None,
) -> Any:
    if not mode.knows(repeats):
        return func(input, repeats, dim, output_size=output_size)
    input = input.flatten() if dim is None else input
    axis = 0 if dim is None else dim
    with for_real():
        rows = mode.remember(torch.arange(input.shape[axis]).repeat_interleave(repeats))
    return input.index_select(axis, rows)


_REWRITTEN: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _get,
    Tensor.__setitem__: _set,
    torch.repeat_interleave: _repeat,
    Tensor.repeat_interleave: _repeat,
}
