"""What decides about a program besides its arguments: settings of modules, and what functions read from elsewhere.

A program has such values built in, so they are part of what it is found by. They are read before each call: only those
that the code can read, and each of them once.
"""

from __future__ import annotations

import dis
import functools
import logging
import pickle
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor, nn

from bridge.keys import PLAIN, Same, constant_key, value_key
from bridge.taken import draws_refused
from mb_torch.compatibility import is_filled
from mb_torch.errors import Unsupported
from mb_torch.stacked.definition import Definition

_logger = logging.getLogger("modelbatch.jax")

_SETTINGS = PLAIN | {tuple, list, np.ndarray, Tensor}
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "jax", "mb_torch", "mb_jax", "bridge"}
_MOST_ENTRIES = 10_000


def settings(modules: Sequence[nn.Module]) -> Hashable:
    """Flags and plain settings of modules, training mode included; of tensors in plain attributes, which they are."""
    # A step does this for every submodule, so no function is called for most values.
    plain = [
        value if value.__class__ in PLAIN else _setting(value)
        for module in modules
        for value in vars(module).values()
        if value.__class__ in _SETTINGS
    ]
    hooked = [module for module in modules if module._forward_hooks or module._forward_pre_hooks]
    return tuple(plain), tuple([Same(hook) for module in hooked for hook in _hooks(module)])


def _setting(value: Any) -> Hashable:
    # Other lists are what a pass leaves behind, PyTorch's own among them, which is not what a module does.
    return value_key(value) if isinstance(value, list) else constant_key(value)


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


@contextmanager
def plain_attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put plain attributes back that a forward pass changes within the block, a counter say.

    A recording runs the pass a few times and later steps do not, so what it counts is nothing to go by; and a changed
    attribute would ask for the next recording.
    """
    before = [
        (vars(module), {name: value for name, value in vars(module).items() if type(value) in PLAIN})
        for module in modules
    ]
    try:
        yield
    finally:
        for attributes, plain in before:
            attributes.update(plain)


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def own_forwards(modules: Sequence[nn.Module]) -> list[Callable[..., Any]]:
    """The forward methods of those modules whose classes are not PyTorch's."""
    return [module.forward for module in modules if not _is_library(type(module))]


def read_by(*functions: Callable[..., Any]) -> Hashable:
    """What functions are, and what they read from outside: closures, defaults, globals, attributes of objects.

    Containers count entry by entry, as long as they have at most 10,000, tensors by identity, other objects by those
    attributes that the code names, methods and properties by what these read in turn. Two sets of functions have equal
    keys if they compute the same from equal arguments.

    Args:
        functions: Functions, modules, bound methods, partials, callable objects.

    Example:
        >>> weight = {"of": 1.0}
        >>> loss = lambda output: output.sum() * weight["of"]
        >>> before = read_by(loss)
        >>> weight["of"] = 2.0
        >>> read_by(loss) == before
        False
    """
    reader = _Reader()
    return tuple([reader.function(function) for function in functions])


@contextmanager
def own_generators_kept(*functions: Callable[..., Any]) -> Iterator[None]:
    """Refuse, of generators of random numbers that functions read from outside, those that are drawn from in the block.

    Their states are put back, whatever error the block ends with.

    Raises:
        Unsupported: One of Python's or NumPy's was drawn from.
    """
    finder = _GeneratorFinder()
    for function in functions:
        finder.function(function)
    before = [(generator, _state_of(generator)) for generator in finder.found]
    error: Exception | None = None
    drawn = []
    try:
        yield
    except Unsupported as caught:  # numbers of its own are why the comparison with PyTorch fails
        error = caught
    finally:
        for generator, state in before:
            if _state_of(generator) != state:
                drawn.append(generator)
                _restore(generator, state)
    if drawn:
        generator = drawn[0]
        library = "random" if isinstance(generator, random.Random) else "numpy.random"
        raise draws_refused(f"a {library}.{type(generator).__name__} of your own") from error
    if error is not None:
        raise error


def _state_of(generator: Any) -> bytes:
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    # A RandomState draws normal numbers in pairs: the second one is kept outside the bit generator.
    is_legacy = isinstance(generator, np.random.RandomState)
    return pickle.dumps(generator.get_state(legacy=False) if is_legacy else generator.bit_generator.state)


def _restore(generator: Any, state: bytes) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(pickle.loads(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(pickle.loads(state))
    else:
        generator.bit_generator.state = pickle.loads(state)


class _Reader:
    """One walk over what functions read; what has been read is not read again."""

    def __init__(self) -> None:
        # By identity; holding the objects keeps identities their own.
        self._seen: dict[tuple[int, int, frozenset[str]], Any] = {}

    def _is_new(self, value: Any, owner: Any = None, names: frozenset[str] = frozenset()) -> bool:
        """Whether something has not been read yet, as part of this owner and by code with these names."""
        place = id(value), id(owner), names
        if place in self._seen:
            return False
        self._seen[place] = value, owner
        return True

    def function(self, function: Any) -> Hashable:
        """A key for anything callable."""
        if isinstance(function, nn.Module):
            return self._module(function)
        if isinstance(function, functools.partial):
            given = [*enumerate(function.args), *function.keywords.items()]
            return self.function(function.func), tuple([(key, self._read(v, _NO_NAMES)) for key, v in given])
        if isinstance(function, types.MethodType):
            method: Any = function.__func__
            return self._code(method, function.__self__)
        if isinstance(function, types.FunctionType):
            return self._code(function, None)
        call: Any = type(function).__call__
        if isinstance(call, types.FunctionType) and not _is_library(type(function)):
            return self._code(call, function)
        plain = vars(function).get("plain_loss") if hasattr(function, "__dict__") else None
        return constant_key(function) if plain is None else self.function(plain)

    def _module(self, module: nn.Module) -> Hashable:
        if not self._is_new(module):
            return None
        modules = list(module.modules())
        tensors = [*module.parameters(), *module.buffers()]
        forwards = tuple([self.function(forward) for forward in own_forwards(modules)])
        return tuple(map(type, modules)), settings(modules), tuple(map(Same, tensors)), forwards

    def _code(self, function: types.FunctionType, owner: Any) -> Hashable:
        """A key for a function, whose first argument is an object if it is a method of one."""
        if _is_library(function):
            return Same(function)
        if not self._is_new(function, owner):
            return function.__code__
        global_names, names = _names(function.__code__)
        outside = function.__globals__
        values = [
            *(cell.cell_contents for cell in function.__closure__ or () if is_filled(cell)),
            *(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).values(),
            *vars(function).values(),
            *(outside[name] for name in global_names if name in outside),
        ]
        of_owner = None if owner is None else self._object(owner, names)
        return function.__code__, of_owner, tuple([self._read(value, names) for value in values])

    def _read(self, value: Any, names: frozenset[str]) -> Hashable:
        """A key for a value that a function reads, whose code has these names of attributes in it."""
        try:
            return self._key_of(value, names)
        except Exception:  # whatever an object of the user's raises when it is looked at
            return Same(value)

    def _key_of(self, value: Any, names: frozenset[str]) -> Hashable:
        cls = type(value)
        if cls in PLAIN:
            return cls, value
        if isinstance(value, Tensor):
            return Same(value)
        if isinstance(value, np.ndarray):
            return constant_key(value)
        if isinstance(value, nn.Module):
            # The code may call other methods than forward.
            return self.function(value), self._object(value, names)
        if isinstance(value, _CALLABLE):
            return self.function(value)
        if isinstance(value, (types.ModuleType, type)):
            return Same(value) if _is_library(value) else (Same(value), self._object(value, names))
        if isinstance(value, (Mapping, Sequence, Set, deque)):
            return cls, self._entries(value, names), self._object(value, names)
        if _is_library(cls) or not (hasattr(value, "__dict__") or hasattr(cls, "__slots__")):
            return constant_key(value), self._object(value, names)
        call = self.function(value) if _of_class(cls, "__call__") else None
        return cls, self._object(value, names), call

    def _entries(self, container: Any, names: frozenset[str]) -> Hashable:
        if not self._is_new(container, names=names):
            return None
        if len(container) > _MOST_ENTRIES:
            _warn(
                f"a model or loss reads a {type(container).__name__} of {len(container)} entries: on XLA a change of "
                f"these does not count, as it does with {_MOST_ENTRIES:,} or fewer; replace it by another one, or give "
                "what changes as loss_args= or shared_args="
            )
            return Same(container), len(container)
        if isinstance(container, Mapping):
            return tuple([(constant_key(key), self._read(value, names)) for key, value in container.items()])
        read = [self._read(value, names) for value in container]
        return frozenset(read) if isinstance(container, Set) else tuple(read)

    def _object(self, value: Any, names: frozenset[str]) -> Hashable:
        """A key for those attributes of an object, class or module that have these names."""
        own = getattr(value, "__dict__", {})
        if isinstance(value, nn.Module):
            own = {**own, **value._modules}
        found = []
        for name in names:
            if name in own:
                found.append((name, self._member(own[name], value, names)))
            elif not isinstance(value, types.ModuleType):
                members = _of_class(value if isinstance(value, type) else type(value), name)
                found += [(name, self._member(member, value, names)) for member in members]
        return frozenset(found)

    def _member(self, member: Any, owner: Any, names: frozenset[str]) -> Hashable:
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        elif isinstance(member, property):
            member = member.fget
        elif isinstance(member, types.MemberDescriptorType):
            # Of a class with slots; one that is empty has nothing to read.
            member = getattr(owner, member.__name__, None)
        if isinstance(member, types.FunctionType):
            return self._code(member, None if isinstance(owner, (type, types.ModuleType)) else owner)
        return self._read(member, names) if type(member) in PLAIN or self._is_new(member, owner, names) else None


class _GeneratorFinder(_Reader):
    """A walk that collects the generators of random numbers, those too of which only a method is read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def _key_of(self, value: Any, names: frozenset[str]) -> Hashable:
        for own in (value, getattr(value, "__self__", None)):
            # That of the system has no state.
            if isinstance(own, _GENERATORS) and not isinstance(own, random.SystemRandom):
                self.found.append(own)
        return super()._key_of(value, names)


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_NO_NAMES: frozenset[str] = frozenset()
_CALLABLE = (types.FunctionType, types.MethodType, functools.partial)


def _of_class(cls: type, name: str) -> list[Any]:
    """What a class and its bases, as far as they are no library's, have under a name: ``super()`` reaches all."""
    return [vars(own)[name] for own in cls.__mro__ if name in vars(own) and not _is_library(own)]


def _is_library(value: Any) -> bool:
    if not isinstance(value, (types.ModuleType, types.FunctionType, type)):
        value = type(value)
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__ or ""
    return name.partition(".")[0] in _LIBRARIES


@cache
def _names(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of globals that a function reads, and of attributes, in those functions too that it defines.

    Text counts as a name of an attribute, for ``getattr(settings, "rate")``.
    """
    global_names: dict[str, None] = {}
    attributes: set[str] = set()
    for own in _with_inner(code):
        for instruction in dis.get_instructions(own):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                global_names[instruction.argval] = None
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                attributes.add(instruction.argval)
        attributes |= {constant for constant in own.co_consts if isinstance(constant, str) and constant.isidentifier()}
    return tuple(global_names), frozenset(attributes)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)
