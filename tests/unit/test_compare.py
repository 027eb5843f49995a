"""Negative controls: the comparison that every test relies on must fail where it should, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.compare import assert_close, assert_different, assert_equal

NAN, INF = float("nan"), float("inf")

both = pytest.mark.parametrize("check", [assert_close, assert_equal])


def tree() -> dict[str, Any]:
    return {
        "weights": {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "nesterov": False}],
        "nothing": None,
    }


@both
def test_equal_trees_pass(check: Callable[..., None]) -> None:
    check(tree(), tree())


def change(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    inner: Any = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


@both
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("weights", "a.weight"),
            torch.tensor([[0.0, 1, 2], [3, 4, 5.5]]),
            r"\['a.weight'\].*\(1, 2\): 5.5, expected 5,",
        ),
        (("weights", "a.count"), torch.tensor(4), r"\['a.count'\].*difference 1 "),
        (("weights", "a.weight"), torch.arange(6.0).reshape(2, 3).double(), "float64, expected torch.float32"),
        (("weights", "a.count"), torch.tensor(3, dtype=torch.int32), "int32, expected torch.int64"),
        (("weights", "a.weight"), torch.arange(6.0), r"shape \(6,\), expected \(2, 3\)"),
        (("weights", "a.weight"), torch.arange(6.0).reshape(1, 2, 3), r"shape \(1, 2, 3\)"),
        (("weights", "a.weight"), torch.full((2, 3), NAN), "6 of 6 entries differ"),
        (("weights", "a.weight"), None, "is a NoneType, expected a Tensor"),
        (("weights", "b.weight"), torch.zeros(1), r"\['b.weight'\]: not expected"),
        (("groups",), [], "list of 0, expected a list of 1"),
        (("groups",), [*tree()["groups"], {}], "list of 2, expected a list of 1"),
        (("groups",), tuple(tree()["groups"]), "is a tuple of 1, expected a list of 1"),
        (("groups", 0, "lr"), 0.11, r"\['groups'\]\[0\]\['lr'\]: .*0.11"),
        (("groups", 0, "lr"), NAN, "differ"),
        (("groups", 0, "nesterov"), True, "is True, expected False"),
        (("groups", 0, "nesterov"), 0, "is a int, expected a bool"),
        (("nothing",), 0, "is a int, expected a NoneType"),
    ],
)
def test_a_difference_fails_and_is_named(
    check: Callable[..., None], path: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check(change(tree(), path, value), tree())


@both
def test_a_missing_key_fails(check: Callable[..., None]) -> None:
    shorter = tree()
    del shorter["weights"]["a.count"]
    with pytest.raises(AssertionError, match=r"\['weights'\]\['a.count'\]: missing"):
        check(shorter, tree())


@both
def test_a_shorter_sequence_does_not_pass_for_its_beginning(check: Callable[..., None]) -> None:
    full = [torch.zeros(2), torch.ones(2)]
    for received, expected in ((full[:1], full), (full, full[:1]), ((), tuple(full))):
        with pytest.raises(AssertionError, match=r"expected a (list|tuple) of"):
            check(received, expected)


@both
@pytest.mark.parametrize("empty", [{}, [], {"state": {}, "groups": []}])
def test_comparing_nothing_fails(check: Callable[..., None], empty: Any) -> None:
    with pytest.raises(AssertionError, match="nothing was compared"):
        check(empty, empty)


@both
@pytest.mark.parametrize(("value", "other"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, -INF), (INF, NAN)])
def test_values_that_are_not_finite_match_no_number(check: Callable[..., None], value: float, other: float) -> None:
    for received, expected in (
        (torch.tensor([0.0, value]), torch.tensor([0.0, other])),
        (torch.tensor(value), torch.tensor(other)),
        (value, other),
    ):
        with pytest.raises(AssertionError, match="differ"):
            check(received, expected)


def test_nan_equals_nan_in_bits_only() -> None:
    nan = torch.tensor([1.0, NAN, -NAN])
    assert_equal(nan, nan.clone())
    with pytest.raises(AssertionError, match="2 of 3 entries"):
        assert_close(nan, nan.clone())


@both
def test_equal_infinities_pass(check: Callable[..., None]) -> None:
    check(torch.tensor([INF, -INF]), torch.tensor([INF, -INF]))


def test_the_bound_is_the_documented_one() -> None:
    expected = torch.tensor([0.0, 1.0, -100.0], dtype=torch.float64)
    bound = 2e-5 + 2e-4 * expected.abs()
    assert_close(expected + 0.999 * bound, expected)
    for index in range(3):
        for sign in (1, -1):
            off = expected.clone()
            off[index] += sign * 1.001 * bound[index]
            with pytest.raises(AssertionError, match=f"1 of 3 entries differ, most at \\({index},\\)"):
                assert_close(off, expected)


def test_bits_are_all_that_counts_for_equality() -> None:
    for one, other in (
        (torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.tensor(1 + 1j), torch.tensor(1 - 1j)),
        (torch.tensor([True, False]), torch.tensor([True, True])),
    ):
        assert_equal(one, one.clone())
        with pytest.raises(AssertionError, match="differ"):
            assert_equal(one, other)


def test_the_largest_difference_comes_first() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_close({"a": torch.tensor(1.0), "b": torch.tensor(9.0)}, {"a": torch.tensor(0.0), "b": torch.tensor(0.0)})
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 2 leaves differ"
    assert lines[1].startswith("['b']: 1 of 1 entries differ, most at (): 9")
    assert lines[2].startswith("['a']")


def test_parameters_are_compared_as_tensors() -> None:
    assert_equal(nn.Parameter(torch.ones(2)), torch.ones(2))
    with pytest.raises(AssertionError, match="differ"):
        assert_equal(nn.Parameter(torch.ones(2)), torch.zeros(2))


def test_different_needs_another_value_in_the_same_structure() -> None:
    assert_different([torch.zeros(2), torch.ones(1)], [torch.zeros(2), torch.zeros(1)])
    with pytest.raises(AssertionError, match="the same to the bit"):
        assert_different(tree(), tree())
    with pytest.raises(AssertionError, match="shape"):
        assert_different(torch.zeros(2), torch.zeros(3))
