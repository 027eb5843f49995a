"""One grid: order, counts, kinds of values, what is refused."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from tests.experiments import grid_of
from trainers.config import ParameterGrid, ValidationError


def test_product_in_order_of_insertion_with_the_last_key_fastest() -> None:
    grid = ParameterGrid("sizes", "what it is for")
    grid.add_parameter("model.hidden_size", [128, 256])
    grid.add_nested_parameter("optimizer.lr", [0.1, 0.2, 0.3])
    assert (grid.name, grid.description) == ("sizes", "what it is for")
    assert grid.get_parameter_count() == 6
    assert list(grid.generate_permutations()) == [
        {"model.hidden_size": size, "optimizer.lr": rate} for size in (128, 256) for rate in (0.1, 0.2, 0.3)
    ]
    assert list(grid.parameters) == ["model.hidden_size", "optimizer.lr"]


def test_same_key_again_replaces() -> None:
    grid = grid_of({"seed": [1, 2]})
    grid.add_parameter("seed", [3])
    assert grid.parameters == {"seed": [3]}


def test_empty_grid_has_no_permutation() -> None:
    assert ParameterGrid("empty").get_parameter_count() == 0
    assert list(ParameterGrid("empty").generate_permutations()) == []


@pytest.mark.parametrize(
    ("values", "plain"),
    [
        ((1, 2), [1, 2]),
        (range(3), [0, 1, 2]),
        (np.array([0.5, 1.5]), [0.5, 1.5]),
        (np.arange(2), [0, 1]),
        ([np.float64(0.1), np.int32(2), np.bool_(True), np.str_("x")], [0.1, 2, True, "x"]),
        ([(0.9, 0.999), (0.8, 0.99)], [[0.9, 0.999], [0.8, 0.99]]),
        ((value for value in "ab"), ["a", "b"]),
        ([None, {"deep": (1,)}], [None, {"deep": [1]}]),
        ([pathlib.PurePosixPath("a/b")], ["a/b"]),
    ],
)
def test_values_become_lists_of_plain_values(values: Any, plain: list[Any]) -> None:
    found = grid_of({"custom_params.x": values}).parameters["custom_params.x"]
    assert found == plain
    assert [type(value) for value in found] == [type(value) for value in plain]


@pytest.mark.parametrize("values", ["adam", b"adam", {"a": 1}, {1, 2}, 3, None, 0.5, np.float64(1.0)])
def test_what_is_no_ordered_collection_is_refused(values: Any) -> None:
    with pytest.raises(TypeError, match=r"key 'optimizer\.name': received"):
        ParameterGrid("grid").add_parameter("optimizer.name", values)


@pytest.mark.parametrize("values", [[], (), range(0), np.array([])])
def test_no_value_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="'seed': received no value"):
        ParameterGrid("grid").add_parameter("seed", values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.inf, {1, 2}, {1: "a"}, object()])
def test_values_that_no_file_can_hold_are_refused(value: Any) -> None:
    grid = ParameterGrid("grid")
    with pytest.raises(ValidationError, match=r"custom_params\.x"):
        grid.add_parameter("custom_params.x", [1, value])
    assert grid.parameters == {}


def test_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="received the key 3"):
        ParameterGrid("grid").add_parameter(3, [1])  # type: ignore[arg-type]


def test_unknown_keys_are_not_looked_up_here() -> None:
    assert grid_of({"no.such.key": [1]}).get_parameter_count() == 1


def test_values_put_in_directly_are_checked_as_well() -> None:
    grid = ParameterGrid("grid")
    grid.parameters["seed"] = "12"  # type: ignore[assignment]
    with pytest.raises(TypeError, match="'seed'"):
        list(grid.generate_permutations())


def test_permutations_share_nothing() -> None:
    given = [{"deep": [1]}]
    grid = grid_of({"custom_params.x": given, "seed": [1, 2]})
    permutations = grid.generate_permutations()
    next(permutations)["custom_params.x"]["deep"].append(2)
    assert next(permutations)["custom_params.x"] == {"deep": [1]}
    assert given == [{"deep": [1]}]
    assert [values["custom_params.x"] for values in grid.generate_permutations()] == [{"deep": [1]}, {"deep": [1]}]
