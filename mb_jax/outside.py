"""What decides about a program besides its arguments: settings of modules, and what functions read from elsewhere.

A program has such values built in, so they are part of what it is found by. They are read before each call.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor, nn

from bridge.keys import PLAIN, Same, constant_key, value_key
from mb_torch.stacked.definition import Definition

_logger = logging.getLogger("modelbatch.jax")

_SETTINGS = PLAIN | {tuple, list, np.ndarray, Tensor}
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "jax", "mb_torch", "mb_jax", "bridge"}


def settings(modules: Sequence[nn.Module]) -> Hashable:
    """Flags and plain settings of modules, training mode included; of tensors in plain attributes, which they are."""
    # A step does this for every submodule, so no function is called for most values.
    plain = [
        value if value.__class__ in PLAIN else _setting(value)
        for module in modules
        for value in vars(module).values()
        if value.__class__ in _SETTINGS
    ]
    hooks = [
        Same(hook)
        for module in modules
        if module._forward_hooks or module._forward_pre_hooks
        for hook in _hooks(module)
    ]
    return tuple(plain), tuple(hooks)


def warn_of_differences(definition: Definition) -> None:
    """Log which submodules are not wholly on XLA what they are in PyTorch, once for each name and class."""
    for module in definition.prototype.modules():
        name = definition.module_name(module)
        if any(not _is_library(hook) for hook in _hooks(module)):
            _warn(
                f"{name} has forward hooks: on XLA they run when a program is recorded, not in each step; what they do "
                "to inputs and outputs counts in each step, everything else only then"
            )
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            _warn(
                f"{name}: on XLA a cluster without rows in a batch has zero gradients, where PyTorch gives none; "
                "optimizers with momentum, averages or weight decay move it all the same"
            )


@cache
def _warn(text: str) -> None:
    _logger.warning("%s", text)


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _setting(value: Any) -> Hashable:
    # Other lists are what a pass leaves behind, PyTorch's own among them, which is not what a module does.
    return value_key(value) if isinstance(value, list) else _key(value)


def _key(value: Any) -> Hashable:
    return Same(value) if isinstance(value, Tensor) else constant_key(value)


def methods_of(modules: Sequence[nn.Module]) -> list[types.FunctionType]:
    """The methods of those modules' classes that are not PyTorch's."""
    classes = dict.fromkeys(cls for module in modules for cls in type(module).__mro__ if not _is_library(cls))
    return [member for cls in classes for member in vars(cls).values() if isinstance(member, types.FunctionType)]


def read_by(function: Callable[..., Any], seen: frozenset[int] = frozenset()) -> Hashable:
    """Values that a function reads from outside: its closure, defaults, globals, and the object or module it is of.

    Of objects that are not made of plain values, those attributes count that the function's code names.

    Args:
        function: A function, module, bound method, partial or callable object.
        seen: Functions that are being looked at: a recursive one has caught itself.

    Example:
        >>> weight = {"of": 1.0}
        >>> loss = lambda output: output.sum() * weight["of"]
        >>> before = read_by(loss)
        >>> weight["of"] = 2.0
        >>> read_by(loss) == before
        False
    """
    function = getattr(function, "plain_loss", function)
    if id(function) in seen:
        return None
    seen = seen | {id(function)}
    if isinstance(function, nn.Module):
        modules = list(function.modules())
        tensors = [*function.parameters(), *function.buffers()]
        methods = tuple([read_by(method, seen) for method in methods_of(modules)])
        return settings(modules), tuple(map(Same, tensors)), methods
    if isinstance(function, functools.partial):
        given = (*function.args, *function.keywords.values())
        return read_by(function.func, seen), tuple([_read(value, frozenset(), seen) for value in given])
    if isinstance(function, types.MethodType):
        return _attributes(function.__self__, seen), read_by(function.__func__, seen)
    if not isinstance(function, types.FunctionType):
        call: Any = type(function).__call__
        return _attributes(function, seen), read_by(call, seen) if isinstance(call, types.FunctionType) else None
    if _is_library(function):
        return None
    names = _names(function.__code__)
    outside = function.__globals__
    values = [
        *(cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)),
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
        *vars(function).values(),
        *(outside[name] for name in names if name in outside),
    ]
    return tuple([_read(value, names, seen) for value in values])


def _attributes(owner: Any, seen: frozenset[int]) -> Hashable:
    if isinstance(owner, types.ModuleType):
        return None
    return tuple([_read(value, frozenset(), seen) for value in getattr(owner, "__dict__", {}).values()])


def _read(value: Any, names: frozenset[str], seen: frozenset[int]) -> Hashable:
    """A key for a value that a function reads, whose code has these names in it."""
    if isinstance(value, (nn.Module, types.FunctionType, types.MethodType, functools.partial)):
        return read_by(value, seen)
    key = value_key(value)
    if key is not None:
        return key
    if isinstance(value, (types.ModuleType, type)):
        if _is_library(value):
            return None
    elif isinstance(value, Tensor) or not hasattr(value, "__dict__"):
        return _key(value)
    if id(value) in seen:
        return None
    attributes = vars(value)
    seen = seen | {id(value)}
    return Same(value), tuple([_read(attributes[name], names, seen) for name in names if name in attributes])


def _is_library(value: Any) -> bool:
    if not isinstance(value, (types.ModuleType, types.FunctionType, type)):
        value = type(value)
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__ or ""
    return name.partition(".")[0] in _LIBRARIES


@cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Names of globals and attributes in a function, and in those that it defines."""
    return frozenset(code.co_names).union(*[_names(inner) for inner in _inner(code)])


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
