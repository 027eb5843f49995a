"""Which objects the objects of a loader hold or use: attributes, what functions close over, globals that they name.

Nothing of theirs is run: no property, no ``__getattr__``. The walk is bounded, and says where it was cut short.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import numbers
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import BuiltinMethodType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState | np.random.BitGenerator
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)

_PLAIN = (str, bytes, numbers.Number, Tensor, np.ndarray, ModuleType, type, type(None), logging.Logger)
# What an optimizer and a schedule count is theirs to save.
_CLOSED = (*_PLAIN, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
# Lists of samples are not looked through, but for a few, to see whether they hold generators.
_MOST_ENTRIES, _MOST_OBJECTS, _TRIED_ENTRIES, _TRIED_OBJECTS = 100, 5000, 3, 50
# What these define has no generators of a user's; their objects may.
_LIBRARIES = {*sys.stdlib_module_names, "numpy", "torch", "torchaudio", "torchdata", "torchvision"}
_INSTALLED = ("site-packages", "dist-packages")
_CONTAINERS = (list, tuple, dict, deque)
# Parameters, buffers, hooks: those of a large module would fill the walk.
_OF_MODULES = frozenset(vars(nn.Module())) - {"_modules"}


def reachable(parts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Walk through objects within objects.

    Args:
        parts: Objects by name.

    Returns:
        Each object once, the nearest first, by its path.

    Example:
        >>> [path for path, value in reachable({"dataset": [random.Random(0)]}) if isinstance(value, GENERATORS)]
        ['dataset[0]']
    """
    return _walk(parts, [])


def cuts_of(parts: Mapping[str, Any]) -> list[str]:
    """Return what `reachable` leaves out although it may hold generators, in words.

    Args:
        parts: Objects by name.

    Example:
        >>> cuts_of({"dataset": [random.Random(0)] * 200})
        ['dataset, which has more than 100 entries']
    """
    cuts: list[str] = []
    deque(_walk(parts, cuts), maxlen=0)
    return cuts


def _walk(parts: Mapping[str, Any], cuts: list[str]) -> Iterator[tuple[str, Any]]:
    waiting = deque(parts.items())
    # Held, so that no other object gets the number of one that is gone.
    seen: dict[int, Any] = {}
    while waiting:
        path, value = waiting.popleft()
        if _is(value, _CLOSED) or id(value) in seen:
            continue
        if len(seen) == _MOST_OBJECTS:
            cuts.append(f"what lies beyond the first {_MOST_OBJECTS} objects, from {path} on")
            return
        seen[id(value)] = value
        yield path, value
        if _is(value, GENERATORS):
            continue
        if _holds_too_many(value) and _some_entries_hold_generators(value):
            cuts.append(f"{path}, which has more than {_MOST_ENTRIES} entries")
        if _is(value, (set, frozenset)) and _some_entries_hold_generators(value):
            cuts.append(f"{path}, a set, which has another order in every process")
        waiting.extend(held(path, value))


def held(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Return what an object holds or uses itself.

    Args:
        path: Of the object.
        value: The object.

    Returns:
        Objects by their paths.
    """
    if _is(value, _CONTAINERS) and not _holds_too_many(value):
        yield from _entries(path, value)
    yield from _uses(path, value)


def own_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object itself, those in ``__slots__`` too.

    Args:
        value: Any object.
    """
    found = dict(_namespace(value))
    for name, descriptor in _slots(value).items():
        with contextlib.suppress(AttributeError):
            found[name] = descriptor.__get__(value)
    return found


def set_own_attribute(value: Any, name: str, content: Any) -> None:
    """Set one of `own_attributes`.

    Args:
        value: The object.
        name: Of the attribute.
        content: The new one.
    """
    if name in _namespace(value):
        _namespace(value)[name] = content
    else:
        _slots(value)[name].__set__(value, content)


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    # isinstance() would ask a proxy for its __class__.
    return issubclass(type(value), kinds)


def _namespace(value: Any) -> dict[str, Any]:
    with contextlib.suppress(AttributeError, TypeError):
        found = object.__getattribute__(value, "__dict__")
        return found if isinstance(found, dict) else {}
    return {}


def _slots(value: Any) -> dict[str, Any]:
    return {
        name: entry
        for cls in reversed(_own_classes(value))
        for name, entry in vars(cls).items()
        if isinstance(entry, MemberDescriptorType)
    }


def _own_classes(value: Any) -> list[type]:
    return [cls for cls in type(value).__mro__ if not _is_library(vars(cls).get("__module__"))]


def _is_library(module: Any) -> bool:
    return not isinstance(module, str) or _package(module) in _LIBRARIES


def _package(module: str) -> str:
    return module.partition(".")[0]


def _holds_too_many(value: Any) -> bool:
    kind = _container(value)
    return kind is not None and kind.__len__(value) > _MOST_ENTRIES


def _container(value: Any) -> Any:
    """Whose methods are to be called: a subclass may do something else."""
    return next((kind for kind in _CONTAINERS if _is(value, (kind,))), None)


def _entries(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if _is(value, (dict,)):
        for index, (key, entry) in enumerate(list(dict.items(value))):
            # Any other key may write itself differently in the next run.
            yield f"{path}[{key!r}]" if type(key) in (str, int) else f"{path}[key {index}]", entry
    else:
        entries = list(_container(value).__iter__(value))
        yield from ((f"{path}[{index}]", entry) for index, entry in enumerate(entries))


def _some_entries_hold_generators(value: Any) -> bool:
    entries = itertools.islice(dict.values(value) if _is(value, (dict,)) else value, _TRIED_ENTRIES)
    waiting, tried = deque(entries), 0
    while waiting and tried < _TRIED_OBJECTS:
        entry = waiting.popleft()
        tried += 1
        if _is(entry, GENERATORS):
            return True
        if not _is(entry, _CLOSED):
            if _is(entry, _CONTAINERS) and not _holds_too_many(entry):
                waiting.extend(inner for _, inner in _entries("", entry))
            waiting.extend(own_attributes(entry).values())
    return False


def _uses(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if _is(value, (FunctionType,)):
        yield from _of_function(path, value)
    elif _is(value, (MethodType,)):
        yield from [(path, value.__self__), (path, value.__func__)]
    elif _is(value, (BuiltinMethodType,)):
        yield path, value.__self__
    elif _is(value, (staticmethod, classmethod)):
        yield path, value.__func__
    elif _is(value, (property,)):
        yield path, value.fget
    elif _is(value, (functools.cached_property,)):
        yield path, value.func
    elif _is(value, (functools.partial,)):
        yield from [(path, value.func), (f"{path}.args", value.args), (f"{path}.keywords", value.keywords)]
    else:
        yield from _of_object(f"{path}." if path else "", value)


def _of_object(dot: str, value: Any) -> Iterator[tuple[str, Any]]:
    left_out: frozenset[str] = _OF_MODULES if _is(value, (nn.Module,)) else frozenset()
    own = own_attributes(value)
    yield from ((dot + name, entry) for name, entry in own.items() if name not in left_out)
    for name, entry in _of_class(value).items():
        if name not in own:
            yield dot + name, entry


def _of_class(value: Any) -> dict[str, Any]:
    """What the classes that are not a library's define; nothing special but functions, as ``__getitem__``."""
    found: dict[str, Any] = {}
    for cls in _own_classes(value):
        for name, entry in list(vars(cls).items()):
            if isinstance(entry, FunctionType) or not (name.startswith("__") or _is(entry, (MemberDescriptorType,))):
                # A method that is overridden may be called by super().
                found[name if name not in found else f"{cls.__name__}.{name}"] = entry
    return found


def _of_function(path: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What it closes over, its defaults, and what it names of its module's and other modules' globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):
            yield f"{path}.{name}", cell.cell_contents
    yield f"{path}.__defaults__", function.__defaults__
    yield f"{path}.__kwdefaults__", function.__kwdefaults__
    yield from ((f"{path}.{name}", entry) for name, entry in list(vars(function).items()))
    scope = function.__globals__
    if _is_library(scope.get("__name__")):
        return
    names = _names(function.__code__)
    for name in names:
        value = scope.get(name)
        if _is(value, (ModuleType, type)):
            yield from _named_within(f"{path}.{name}", value, names, scope)
        elif _is_followed(value, scope):
            yield f"{path}.{name}", value


def _named_within(path: str, owner: Any, names: dict[str, None], scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of a module or class of the user's, what a function may name: ``helpers.augment``."""
    namespace = vars(owner)
    module = namespace if _is(owner, (ModuleType,)) else vars(sys.modules.get(namespace.get("__module__", ""), sys))
    if _is_near(module, scope):
        for name in names:
            value = namespace.get(name)
            if _is_followed(value, scope):
                yield f"{path}.{name}", value


def _is_followed(value: Any, scope: Mapping[str, Any]) -> bool:
    """Of globals, generators and what may be called: anything else, as a trainer, is often of that name by chance."""
    if _is(value, (FunctionType,)):
        return _is_near(value.__globals__, scope)
    return _is(value, GENERATORS) or any("__call__" in vars(cls) for cls in type(value).__mro__)


def _is_near(scope: Mapping[str, Any], asking: Mapping[str, Any]) -> bool:
    """Whether functions of a module are followed from another one: those of other installed packages are not."""
    name, asking_name = scope.get("__name__"), asking.get("__name__")
    if not isinstance(name, str) or _is_library(name):
        return False
    is_installed = any(part in str(scope.get("__file__")) for part in _INSTALLED)
    return not is_installed or (isinstance(asking_name, str) and _package(name) == _package(asking_name))


def _names(code: CodeType) -> dict[str, None]:
    """What a function and those within it name, in order."""
    found = dict.fromkeys(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= _names(inner)
    return found
