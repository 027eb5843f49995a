"""Torch tensors whose values live in JAX arrays.

A JAX program takes the stacked parameters as arrays, donates them and returns new ones. The front-end, optimizers
and callers see `MirrorParameter` and `MirrorBuffer`: torch tensors with memory of their own that are brought up to
date when somebody looks, and whose values are sent to JAX when somebody may have written.

Torch can write in ways that no version counter shows (fused optimizers, ``p.data``, numpy arrays). So every use
from torch counts as a write, unless it is known to be none: every one passes ``__torch_function__``. What outlives
the use, such as ``p.data``, a view or a numpy array, shares the mirror's storage, and storages count their holders.
While there is another holder the two sides run in lockstep: `array` always copies to JAX, `set_array` at once back.

What no tensor subclass is told about, and what therefore needs `pull` before (and `touch` after a write):
``torch.tensor(mirror)``, ``torch.as_tensor(mirror)``, ``plain.set_(mirror)``, ``torch.func`` transforms of a function
that is given the mirror itself, and memory behind ``data_ptr()``, which counts as metadata because optimizers compare
it at every step. ``mirror.detach()`` in place of the mirror is always right. A graph that has saved a mirror keeps
the old values after `set_array`; if the mirror is brought up to date before ``backward()``, that raises, as after
any other change in place.

Functions made by ``torch.compile`` refuse mirrors as arguments (give them ``mirror.detach()``). Mirrors are for one
thread at a time.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import torch
from torch import Tensor, nn

from mb_jax.sharding import ONE_DEVICE, Layout
from mb_jax.torch_functions import Mirrored, call
from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.stacked.model_view import ModelView, Stack
from mb_torch.state import StackedState

_PLAIN = torch._C.DisableTorchFunctionSubclass
_use_count: Callable[[int], int] = torch._C._storage_Use_Count
_is_alias_of: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]


def _holders(tensor: Tensor) -> int:
    """How many tensors, arrays and Python names hold a tensor's storage, plus a constant."""
    storage = tensor.untyped_storage()
    return _use_count(storage._cdata) + sys.getrefcount(storage)


# What `_holders` finds where there is one holder.
_ONE_HOLDER = _holders(torch.empty(1))


class _Mirror(Mirrored, torch.Tensor):
    """What `MirrorParameter` and `MirrorBuffer` share.

    ``_stale``: the array is newer than torch's values. ``_touched``: torch may have written, or may do so through
    memory that somebody else holds. They are never both set.

    ``_layout``: where the array lives.
    """

    _array: jax.Array | None
    _aval: Any
    _layout: Layout
    _stale: bool
    _touched: bool
    _views: list[weakref.ref[MirrorView]]

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Self:
        """Take over the memory of `data`; as long as others hold it too, they see the same values."""
        data = data.detach()
        if data.layout is torch.strided and torch._debug_has_internal_overlap(data):
            data = data.clone(memory_format=torch.contiguous_format)
        mirror: Self = torch.Tensor._make_subclass(cls, data, requires_grad)
        mirror._array = mirror._aval = None
        mirror._layout = ONE_DEVICE
        mirror._stale, mirror._touched = False, True
        mirror._views = []
        return mirror

    @property
    def array_layout(self) -> Layout:
        """Where the array lives.

        Example:
            >>> MirrorBuffer(torch.zeros(2)).array_layout.num_devices
            1
        """
        return self._layout

    def array(self, layout: Layout = ONE_DEVICE) -> jax.Array:
        """Return the current values as a JAX array, which may be donated if `set_array` follows.

        Args:
            layout: Where they are wanted; they live there from now on.

        Example:
            >>> MirrorParameter(torch.ones(2)).array().tolist()
            [1.0, 1.0]
        """
        if layout is not self._layout:
            self.touch()
            self._layout = layout
        return self._push() if self._touched else self._array  # type: ignore[return-value]

    def set_array(self, new: jax.Array, layout: Layout = ONE_DEVICE) -> None:
        """Make a JAX array the values; those of torch, and the array before, are dropped unread.

        Args:
            new: An array of the same shape and dtype.
            layout: Where it lives.

        Raises:
            InvalidInput: It has another shape or dtype; nothing has changed.

        Example:
            >>> mirror = MirrorBuffer(torch.ones(2))
            >>> mirror.set_array(mirror.array() * 3)
            >>> mirror.tolist()
            [3.0, 3.0]
        """
        if not self._touched and new.aval is self._aval and layout is self._layout:
            # The step of a training loop: a program's results have the same abstract value every time.
            self._array = new
            self._stale = True
            return
        with _PLAIN():
            layout.check(new, self)
        self._array, self._aval, self._stale, self._layout = new, new.aval, True, layout
        if self._touched:
            self._touched = self._has_aliases()
            if self._touched:
                self.pull()

    def pull(self) -> None:
        """Bring torch's values up to date, in place.

        Example:
            >>> mirror = MirrorBuffer(torch.zeros(2))
            >>> mirror.set_array(mirror.array() + 1)
            >>> mirror.pull()
            >>> torch.as_tensor(mirror).sum()
            tensor(2.)
        """
        if self._stale:
            with _PLAIN():
                self._layout.copy(self._array, self)  # type: ignore[arg-type]
            self._stale = False

    def touch(self) -> None:
        """Say that torch has written, or may write, without having been seen.

        Example:
            >>> MirrorBuffer(torch.zeros(2)).touch()
        """
        self.pull()
        self._touched = True

    def add_view(self, view: MirrorView) -> None:
        """Know a view that shares the storage for good: it tells of every use, so it is no alias.

        Example:
            >>> parameter = MirrorParameter(torch.zeros(2, 3))
            >>> len([MirrorView(Stack("weight", parameter), model) for model in range(2)])
            2
        """
        self._views = [known for known in self._views if known() is not None]
        self._views.append(weakref.ref(view))

    def _push(self) -> jax.Array:
        with _PLAIN():
            self._array = self._layout.push(self)
        self._aval = self._array.aval
        self._touched = self._has_aliases()
        return self._array

    def _has_aliases(self) -> bool:
        with _PLAIN():
            known = sum(_shares_storage(view(), self) for view in self._views)
            return _holders(self) - known > _ONE_HOLDER

    def _mirror(self) -> Self:
        return self

    # The two methods that torch runs without asking __torch_function__.
    def set_(self, *args: Any, **kwargs: Any) -> Self:
        """Take over another storage, as ``torch.Tensor.set_``.

        Example:
            >>> MirrorBuffer(torch.zeros(2)).set_(torch.ones(3)).array().tolist()
            [1.0, 1.0, 1.0]
        """
        result: Self = call(torch.Tensor.set_, (self, *args), kwargs)
        return result

    def as_subclass(self, cls: type[Any]) -> Any:
        """Share the memory with a tensor of another class, as ``torch.Tensor.as_subclass``.

        Example:
            >>> type(MirrorBuffer(torch.zeros(2)).as_subclass(torch.Tensor)).__name__
            'Tensor'
        """
        return call(torch.Tensor.as_subclass, (self, cls), {})

    def _plain_copy(self) -> Tensor:
        self.pull()
        with _PLAIN():
            plain: Tensor = self.detach().clone(memory_format=torch.preserve_format)
        return plain

    def __copy__(self) -> Self:
        result: Self = _rebuild(type(self), self._plain_copy(), self.requires_grad, self._attributes())
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Like nn.Parameter's: without the gradient.
        if id(self) not in memo:
            memo[id(self)] = type(self)(self._plain_copy(), self.requires_grad)
        result: Self = memo[id(self)]
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._plain_copy(), self.requires_grad, self._attributes())

    def _attributes(self) -> dict[str, Any]:
        """What others have set on the mirror."""
        return {name: value for name, value in vars(self).items() if name not in _Mirror.__annotations__}

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Read like the tensor it stands for."""
        self.pull()
        with _PLAIN():
            plain: Any = self.detach().requires_grad_(self.requires_grad)
            return str(plain.__repr__(**options))


class MirrorParameter(_Mirror, nn.Parameter):
    """A parameter whose values live in a JAX array. It is a leaf with an ordinary ``grad``.

    Args:
        data: The first values. Their memory is taken over; use a clone where it is to stay apart.
        requires_grad: As in ``nn.Parameter``.

    Example:
        >>> weight = MirrorParameter(torch.ones(2))
        >>> with torch.no_grad():
        ...     weight += 1
        >>> weight.set_array(weight.array() * 10)
        >>> weight.tolist()
        [20.0, 20.0]
    """

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Self:
        """As `_Mirror`, with gradient."""
        return super().__new__(cls, data, requires_grad)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Read like the parameter it stands for."""
        return "Parameter containing:\n" + super().__repr__(**options)


class MirrorBuffer(_Mirror):
    """A buffer, or any other tensor, whose values live in a JAX array.

    Args:
        data: The first values. Their memory is taken over; use a clone where it is to stay apart.
        requires_grad: As in ``torch.tensor``.

    Example:
        >>> running_mean = MirrorBuffer(torch.zeros(3))
        >>> _ = running_mean.fill_(2.0)
        >>> running_mean.array().tolist()
        [2.0, 2.0, 2.0]
    """


class MirrorView(Mirrored, ModelView):
    """One model's part of a stack whose parameter is a mirror. Using it uses the mirror.

    Args:
        stack: The stacked parameter, a `MirrorParameter`.
        model: Which model.

    Raises:
        InvalidInput: The stack's parameter is no mirror.

    Example:
        >>> stack = Stack("weight", MirrorParameter(torch.zeros(2, 3)))
        >>> with torch.no_grad():
        ...     _ = MirrorView(stack, 1).fill_(5.0)
        >>> stack.parameter.array().sum().item()
        15.0
    """

    def __new__(cls, stack: Stack, model: int) -> Self:
        """Share the storage of ``stack[model]``."""
        if not isinstance(stack.parameter, _Mirror):
            raise InvalidInput(
                f"stack {stack.name!r}", received=type(stack.parameter).__name__, expected="a MirrorParameter"
            )
        view = super().__new__(cls, stack, model)
        assert isinstance(view, cls)
        stack.parameter.add_view(view)
        return view

    def _mirror(self) -> _Mirror:
        parameter = self._stack.parameter
        assert isinstance(parameter, _Mirror)
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> MirrorView:
        if id(self) not in memo:
            memo[id(self)] = MirrorView(copy.deepcopy(self._stack, memo), self._model)
        result: MirrorView = memo[id(self)]
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return MirrorView, (self._stack, self._model)


def as_mirrors(state: StackedState) -> tuple[list[MirrorParameter], list[MirrorBuffer]]:
    """Replace the parameters and buffers of a stacked state that are no mirrors yet; tied names stay tied.

    Optimizers hold the parameters they were given: call this before anybody can have made one. Buffers are replaced
    by others whenever a module is moved or converted, so this is called again before every use of the state.

    Args:
        state: The stacks; changed in place.

    Returns:
        The mirrors of the parameters and of the buffers, in the order of ``state``.

    Raises:
        Unsupported: A parameter that would be replaced has hooks.

    Example:
        >>> state = StackedState({"scale": "scale"}, {"scale": nn.Parameter(torch.ones(2))}, {})
        >>> parameters, buffers = as_mirrors(state)
        >>> state.parameters["scale"] is parameters[0]
        True
    """
    parameters: list[Any] = [*state.parameters.values()]
    buffers: list[Any] = [*state.buffers.values()]
    if all(type(p) is MirrorParameter for p in parameters) and all(type(b) is MirrorBuffer for b in buffers):
        return parameters, buffers
    mirrors = {name: _mirror_of(name, tensor, MirrorParameter) for name, tensor in state.parameters.items()}
    mirrors |= {name: _mirror_of(name, tensor, MirrorBuffer) for name, tensor in state.buffers.items()}
    for name, first in state.names.items():
        owner, leaf = state._owner(name)
        kind: Any = owner._parameters if leaf in owner._parameters else owner._buffers
        kind[leaf] = mirrors[first]
    return as_mirrors(state)


def _mirror_of(name: str, tensor: Tensor, cls: type[_Mirror]) -> Tensor:
    if type(tensor) is cls:
        return tensor
    if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
        raise Unsupported(
            f"{name!r} has hooks, which the parameter that takes its place would lack",
            fix="Register them on stacked_params[name] of the finished batch.",
        )
    mirror = cls(tensor, tensor.requires_grad)
    mirror.grad = tensor.grad
    vars(mirror).update(vars(tensor))
    return mirror


def _rebuild(cls: type[_Mirror], data: Tensor, requires_grad: bool, attributes: Mapping[str, Any]) -> Any:
    mirror = cls(data, requires_grad)
    vars(mirror).update(attributes)
    return mirror


def _shares_storage(view: MirrorView | None, mirror: _Mirror) -> bool:
    return view is not None and _is_alias_of(view, mirror)
