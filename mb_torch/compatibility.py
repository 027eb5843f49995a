"""Decides whether models may share one batch, and names the first difference when they may not.

A batch runs one definition for all its models, so everything that is not a tensor of the state must agree: two
models with different ``Dropout(p)`` would otherwise silently both use the first one's.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mb_torch.errors import IncompatibleModels

_STATE_DICTS = frozenset({"_parameters", "_buffers", "_modules"})
_DERIVED = frozenset({"_flat_weights", "_flat_weight_refs"})
# Built-in functions have no code to compare; only the very same one is the same.
_BUILT_IN = (types.BuiltinFunctionType, types.MethodWrapperType, types.MethodDescriptorType, torch._ops.OpOverload)
_VALUES = (
    int,
    float,
    complex,
    str,
    bytes,
    bool,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    enum.Enum,
    slice,
)


def check_compatible(reference: nn.Module, model: nn.Module, index: int, ignore: Collection[str] = ()) -> None:
    """Raise unless ``model`` has the reference's classes, tensors and settings.

    Args:
        reference: Model 0, or a copy of it on the meta device.
        model: The model to compare.
        index: Its number, for the error.
        ignore: Names of settings that may differ, as the error shows them (``"0.p"``) or their last part (``"p"``).

    Raises:
        IncompatibleModels: Names the model and the first difference.

    Example:
        >>> check_compatible(nn.Linear(2, 3), nn.Linear(2, 3), 1)
    """
    found = _Comparison(reference, model, frozenset(ignore)).first_difference()
    if found is not None:
        raise IncompatibleModels(
            f"model {index} cannot share a batch with model 0: {found}",
            fix="Use models that differ in values only, or name a harmless setting in ignore=(...).",
        )


class _Comparison:
    """One walk over two models; methods return the first difference as text, or None."""

    def __init__(self, reference: nn.Module, model: nn.Module, ignore: frozenset[str]) -> None:
        self.reference, self.model, self.ignore = reference, model, ignore
        self.registered = _registered(reference), _registered(model)
        # Pairs compared before, kept alive: the id of a temporary would be given out again.
        self.seen: dict[tuple[int, int], tuple[Any, Any]] = {}

    def first_difference(self) -> str | None:
        ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (self.reference, self.model))
        if list(ours) != list(theirs):
            return f"its submodules differ: {_key_difference(ours, theirs)}"
        for name, module in ours.items():
            found = self._module(name, module, theirs[name])
            if found is not None:
                return found
        return self._ties()

    def _module(self, name: str, a: nn.Module, b: nn.Module) -> str | None:
        where = f"submodule {name!r}" if name else "the model"
        if self._classes(_plain_class(a), _plain_class(b), "") is not None:
            return f"{where} is a {type(b).__name__}, in model 0 a {type(a).__name__}"
        prefix = f"{name}." if name else ""
        for kind in ("_parameters", "_buffers"):
            found = self._tensors(prefix, getattr(a, kind), getattr(b, kind))
            if found is not None:
                return found
        recomputed = {hook.name for hook in a._forward_pre_hooks.values() if hasattr(hook, "name")}
        return self._attributes(prefix, vars(a), vars(b), skip=_STATE_DICTS | _DERIVED | recomputed)

    def _tensors(self, prefix: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
        if list(a) != list(b):
            return f"its tensors differ: {_key_difference(a, b, prefix)}"
        for name, ours in a.items():
            theirs = b[name]
            if (ours is None) != (theirs is None):
                return f"{prefix}{name} is {'None' if theirs is None else 'a tensor'} in it only"
            for setting in ("shape", "dtype", "requires_grad", "layout"):
                if ours is not None and getattr(ours, setting) != getattr(theirs, setting):
                    return (
                        f"{prefix}{name} has {setting} {_shown(getattr(theirs, setting))}, "
                        f"in model 0 {_shown(getattr(ours, setting))}"
                    )
        return None

    def _attributes(
        self, prefix: str, a: Mapping[str, Any], b: Mapping[str, Any], skip: Set[str] = frozenset()
    ) -> str | None:
        ignored = {name for name in a.keys() | b.keys() if name in self.ignore or prefix + name in self.ignore}
        ours, theirs = ({k: v for k, v in side.items() if k not in skip | ignored} for side in (a, b))
        if ours.keys() != theirs.keys():
            return f"its settings differ: {_key_difference(ours, theirs, prefix)}"
        for name, value in ours.items():
            # Hook tables are keyed by process-wide counters: only what they call can agree.
            hooks = name.endswith("_hooks") and isinstance(value, dict)
            sides = [list(side.values()) for side in (value, theirs[name])] if hooks else [value, theirs[name]]
            found = self._values(sides[0], sides[1], prefix + name)
            if found is not None:
                return found
        return None

    def _values(self, a: Any, b: Any, where: str) -> str | None:
        if a is b or (id(a), id(b)) in self.seen:
            return None
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return self._plain_tensors(a, b, where)
        if isinstance(a, type) and isinstance(b, type):
            return self._classes(a, b, where)
        if type(a) is not type(b):
            return f"{where} is {_shown(b)}, in model 0 {_shown(a)}"
        if isinstance(a, _VALUES):
            return None if a == b or a != a else f"{where} is {_shown(b)}, in model 0 {_shown(a)}"
        self.seen[id(a), id(b)] = a, b
        return self._objects(a, b, where)

    def _objects(self, a: Any, b: Any, where: str) -> str | None:
        """Compare two objects of one type that are no plain values."""
        if isinstance(a, np.ndarray):
            return None if np.array_equal(a, b) else f"the array {where} differs"
        if isinstance(a, Mapping):
            if a.keys() != b.keys():
                return f"{where} differs: {_key_difference(a, b)}"
            return self._first((a[key], b[key], f"{where}[{key!r}]") for key in a)
        if isinstance(a, (list, tuple)):
            if len(a) != len(b):
                return f"{where} has {len(b)} entries, in model 0 {len(a)}"
            return self._first((x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
        if isinstance(a, Set):
            return None if a == b else f"{where} is {_shown(b)}, in model 0 {_shown(a)}"
        if isinstance(a, functools.partial):
            return self._values((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), where)
        if isinstance(a, types.MethodType):
            return self._values((a.__func__, a.__self__), (b.__func__, b.__self__), where)
        if isinstance(a, types.FunctionType):
            return self._functions(a, b, where)
        if isinstance(a, _BUILT_IN):
            return None if a == b else f"{where} is {b!r}, in model 0 {a!r}"
        if isinstance(a, nn.Module) or dataclasses.is_dataclass(a) or isinstance(a, types.SimpleNamespace):
            return self._attributes(f"{where}.", vars(a), vars(b))
        return None

    def _first(self, triples: Any) -> str | None:
        return next((found for triple in triples if (found := self._values(*triple)) is not None), None)

    def _plain_tensors(self, a: Tensor, b: Tensor, where: str) -> str | None:
        both_registered = id(a) in self.registered[0] and id(b) in self.registered[1]
        derived = a.grad_fn is not None or b.grad_fn is not None
        if both_registered or derived:
            return None
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b.to(a.device)):
            return f"the tensor {where} is no parameter or buffer and has other values (register it as a buffer)"
        return None

    def _functions(self, a: types.FunctionType, b: types.FunctionType, where: str) -> str | None:
        ours, theirs = a.__code__, b.__code__
        if (ours.co_code, ours.co_names) != (theirs.co_code, theirs.co_names) or not _same_constants(ours, theirs):
            return f"the function {where} has other code"
        cells = [[cell.cell_contents for cell in f.__closure__ or () if is_filled(cell)] for f in (a, b)]
        return self._values(
            [a.__defaults__, a.__kwdefaults__, cells[0]], [b.__defaults__, b.__kwdefaults__, cells[1]], where
        )

    def _classes(self, a: type, b: type, where: str) -> str | None:
        """A class made anew by a factory function is the same class if its code is."""
        if a is b:
            return None
        different = f"{where} is {b.__qualname__}, in model 0 {a.__qualname__}"
        if (a.__module__, a.__qualname__, len(a.__bases__)) != (
            b.__module__,
            b.__qualname__,
            len(b.__bases__),
        ):
            return different
        if any(self._classes(x, y, "") is not None for x, y in zip(a.__bases__, b.__bases__, strict=True)):
            return different
        own = [{k: v for k, v in vars(c).items() if isinstance(v, types.FunctionType)} for c in (a, b)]
        self.seen[id(a), id(b)] = a, b
        if own[0].keys() != own[1].keys() or self._values(own[0], own[1], where) is not None:
            return different
        return None

    def _ties(self) -> str | None:
        ours, theirs = (_tied_names(m) for m in (self.reference, self.model))
        return None if ours == theirs else f"its tied tensors are {theirs}, in model 0 {ours}"


def _registered(module: nn.Module) -> set[int]:
    return {id(t) for t in (*module.parameters(), *module.buffers())}


def _plain_class(module: nn.Module) -> type:
    """The user's class: ``torch.nn.utils.parametrize`` makes a subclass of it per instance."""
    return type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)


def _tied_names(module: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _same_constants(a: types.CodeType, b: types.CodeType) -> bool:
    """Compare constants, nested functions by their code (code objects also hold line numbers)."""
    if len(a.co_consts) != len(b.co_consts):
        return False
    return all(
        (x.co_code == y.co_code and _same_constants(x, y))
        if isinstance(x, types.CodeType) and isinstance(y, types.CodeType)
        else type(x) is type(y) and x == y
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )


def is_filled(cell: Any) -> bool:
    """Whether a cell of a closure has a value; that of a function that is defined later has none yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _key_difference(ours: Collection[str], theirs: Collection[str], prefix: str = "") -> str:
    missing = [f"{prefix}{key}" for key in ours if key not in theirs]
    extra = [f"{prefix}{key}" for key in theirs if key not in ours]
    if missing or extra:
        return ", ".join([f"{key!r} is missing" for key in missing[:3]] + [f"{key!r} is extra" for key in extra[:3]])
    return "their order"


def _shown(value: Any) -> str:
    shape = tuple(value) if isinstance(value, torch.Size) else value
    text = f"a {type(value).__name__}" if isinstance(value, (Callable, Tensor)) else repr(shape)  # type: ignore[arg-type]
    return text if len(text) <= 80 else text[:77] + "..."
