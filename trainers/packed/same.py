"""Whether two objects were made alike: the same classes, settings and numbers, all the way down."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def first_difference(ours: Any, theirs: Any, where: str) -> str | None:
    """Return the place of the first difference between two objects; None if they were made alike.

    Functions are the same if code, defaults and closures are; tensors, arrays and random generators by their content;
    any other object if its class is the same and what it would be pickled by.

    Args:
        ours: One.
        theirs: The other.
        where: Name of both.

    Example:
        >>> first_difference({"rows": [1, 2]}, {"rows": [1, 3]}, "data")
        "data['rows'][1]"
        >>> first_difference(torch.ones(2), torch.ones(2), "data") is None
        True
    """
    return _Comparison().difference(ours, theirs, where)


class _Comparison:
    def __init__(self) -> None:
        # Pairs compared before, kept alive: the id of a temporary would be given out again.
        self._seen: dict[tuple[int, int], tuple[Any, Any]] = {}

    def difference(self, a: Any, b: Any, where: str) -> str | None:
        if a is b or (id(a), id(b)) in self._seen:
            return None
        if type(a) is not type(b):
            return where
        if isinstance(a, _PLAIN):
            return None if a == b or (a != a and b != b) else where
        self._seen[id(a), id(b)] = a, b
        if isinstance(a, (Tensor, np.ndarray, torch.Generator)):
            return None if _are_same_values(a, b) else where
        if isinstance(a, types.FunctionType):
            return where if a.__code__ != b.__code__ else self._parts(_settings(a), _settings(b), where)
        if type(a) in (list, tuple):
            if len(a) != len(b):
                return where
            # Long lists of paths or numbers.
            if all(isinstance(value, _PLAIN) for value in a) and a == b:
                return None
            return self._first((x, y, f"{where}[{place}]") for place, (x, y) in enumerate(zip(a, b, strict=True)))
        if type(a) is dict:
            return self._parts(a, b, where)
        return self._pickled(a, b, where)

    def _parts(self, a: dict[Any, Any], b: dict[Any, Any], where: str) -> str | None:
        if list(a) != list(b):
            return where
        return self._first((value, b[key], f"{where}[{key!r}]") for key, value in a.items())

    def _first(self, triples: Iterable[tuple[Any, Any, str]]) -> str | None:
        return next((found for triple in triples if (found := self.difference(*triple)) is not None), None)

    def _pickled(self, a: Any, b: Any, where: str) -> str | None:
        try:
            forms = a.__reduce_ex__(4), b.__reduce_ex__(4)
        except Exception:  # whatever an object without a pickled form raises
            return None if _are_equal(a, b) else where
        if any(isinstance(form, str) for form in forms):
            return where  # names of two globals
        # How it is made, its attributes, what is in it.
        (made, attributes, contents), (other_made, other_attributes, other_contents) = map(_parts_of, forms)
        found = self.difference(made, other_made, where) or self.difference(contents, other_contents, where)
        if found is not None or not (isinstance(attributes, dict) and isinstance(other_attributes, dict)):
            return found or self.difference(attributes, other_attributes, where)
        if attributes.keys() != other_attributes.keys():
            return where
        return self._first((value, other_attributes[name], f"{where}.{name}") for name, value in attributes.items())


def _settings(function: types.FunctionType) -> dict[str, Any]:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return {
        "defaults": function.__defaults__,
        "keyword defaults": function.__kwdefaults__,
        **{name: cell.cell_contents for name, cell in cells.items() if _is_filled(cell)},
    }


def _is_filled(cell: types.CellType) -> bool:
    """That of a function that is defined later is not."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _parts_of(reduced: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    function, arguments, state, items, pairs, *_ = (*reduced, None, None, None)
    return (function, arguments), state, (list(items or ()), list(pairs or ()))


def _are_same_values(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Generator):
        return a.device == b.device and torch.equal(a.get_state(), b.get_state())
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))
    if torch.equal(a, b.to(a.device)):
        return True
    return a.is_floating_point() and torch.allclose(a, b.to(a.device), rtol=0, atol=0, equal_nan=True)


def _are_equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # arrays of odd kinds have no one answer
        return False
