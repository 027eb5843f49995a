"""The one comparison of nested containers of tensors: strict about structure, type, shape and value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# The promise for float32 after three steps of SGD with momentum; double precision gets a bound of its own.
ATOL, RTOL = 2e-5, 2e-4
_SHOWN = 10

Difference = Callable[[Tensor, Tensor], str | None]


def assert_close(actual: Any, expected: Any, *, atol: float = ATOL, rtol: float = RTOL) -> None:
    """Fail unless `|actual - expected| <= atol + rtol * |expected|` everywhere; NaN is never close to anything.

    Args:
        actual: A tensor, a number or a nest of mappings, lists, tuples and other values.
        expected: The same structure.
        atol: Absolute part of the bound.
        rtol: Relative part of the bound.

    Raises:
        AssertionError: Names each path that differs, the largest difference first.
    """

    def difference(a: Tensor, b: Tensor) -> str | None:
        return _too_far(a, b, atol, rtol)

    _compare(actual, expected, difference)


def assert_equal(actual: Any, expected: Any) -> None:
    """Fail unless every number has the same bits; any NaN equals any other.

    Args:
        actual: A tensor, a number or a nest of mappings, lists, tuples and other values.
        expected: The same structure.

    Raises:
        AssertionError: Names each path that differs, the largest difference first.
    """
    _compare(actual, expected, _other_bits)


def assert_different(actual: Any, other: Any) -> None:
    """Fail if two nests of one structure have the same bits everywhere.

    Raises:
        AssertionError: They do, or their structures differ.
    """
    try:
        assert_equal(actual, other)
    except _ValuesDiffer:
        return
    raise AssertionError("the values are the same to the bit")


class _ValuesDiffer(AssertionError):
    """Structure, dtypes and shapes agree; numbers do not."""


def _compare(actual: Any, expected: Any, difference: Difference) -> None:
    structure, values, leaves = [], [], 0
    for path, a, b, problem in _pairs(actual, expected, ""):
        leaves += 1
        if problem is not None:
            structure.append(f"{path or 'the value'}: {problem}")
            continue
        found = difference(a, b)
        if found is not None:
            values.append((_size_of_difference(a, b), f"{path or 'the value'}: {found}"))
    if not leaves:
        raise AssertionError("nothing was compared: there is no leaf")
    values.sort(key=lambda entry: -entry[0])
    problems = structure + [text for _, text in values]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        text = "\n".join([f"{len(problems)} of {leaves} leaves differ", *problems[:_SHOWN], *more])
        raise AssertionError(text) if structure else _ValuesDiffer(text)


def _pairs(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any, str | None]]:
    """Every leaf with its path: two tensors to compare, or the problem that keeps them from being compared."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield path, a.detach(), b.detach(), _form(a, b)
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            where = f"{path}[{key!r}]"
            if key not in a or key not in b:
                yield where, None, None, "missing" if key not in a else "not expected"
            else:
                yield from _pairs(a[key], b[key], where)
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if type(a) is not type(b) or len(a) != len(b):
            received, wanted = (f"{type(side).__name__} of {len(side)}" for side in (a, b))
            yield path, None, None, f"is a {received}, expected a {wanted}"
            return
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _pairs(left, right, f"{path}[{index}]")
    elif type(a) is type(b) and isinstance(a, float):
        yield path, torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), None
    elif type(a) is not type(b):
        yield path, None, None, f"is a {type(a).__name__}, expected a {type(b).__name__}"
    else:
        empty = torch.empty(0)
        yield path, empty, empty, None if a == b else f"is {a!r}, expected {b!r}"


def _form(a: Tensor, b: Tensor) -> str | None:
    for name in ("shape", "dtype", "layout", "device"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            shown = (tuple(ours), tuple(theirs)) if name == "shape" else (ours, theirs)
            return f"has {name} {shown[0]}, expected {shown[1]}"
    return None


def _exact(tensor: Tensor) -> Tensor:
    """The same numbers in a type that holds their differences."""
    if tensor.is_complex():
        return torch.view_as_real(tensor).double()
    return tensor.double()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = _exact(a), _exact(b)
    # Equal infinities are no distance apart, and their difference would be NaN.
    return torch.where(a == b, 0.0, (a - b).abs())


def _size_of_difference(a: Tensor, b: Tensor) -> float:
    distance = _distance(a, b)
    return float(distance.nan_to_num(nan=torch.inf).max()) if distance.numel() else 0.0


def _too_far(a: Tensor, b: Tensor, atol: float, rtol: float) -> str | None:
    distance, scale = _distance(a, b), _exact(b).abs()
    # Without the test for finite values an infinite expectation would allow everything.
    close = (distance == 0) | (scale.isfinite() & (distance <= atol + rtol * scale))
    return _described(a, b, ~close, f"allowed {atol:g} + {rtol:g} * |expected|")


def _other_bits(a: Tensor, b: Tensor) -> str | None:
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return _described(a, b, a != b, "allowed none")
    signs = torch.signbit(a) != torch.signbit(b)
    both_nan = a.isnan() & b.isnan()
    return _described(a, b, ((a != b) | signs) & ~both_nan, "allowed none")


def _described(a: Tensor, b: Tensor, wrong: Tensor, allowed: str) -> str | None:
    if not bool(wrong.any()):
        return None
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    distance = torch.where(wrong, _distance(a, b).nan_to_num(nan=torch.inf), -1.0)
    worst = int(distance.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), wrong.shape)) if wrong.dim() else ()
    return (
        f"{int(wrong.sum())} of {wrong.numel()} entries differ, most at {place}: {float(a.flatten()[worst]):.9g}, "
        f"expected {float(b.flatten()[worst]):.9g}, difference {float(distance.max()):.3g} ({allowed})"
    )
