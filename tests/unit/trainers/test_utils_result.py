"""A value or an error as a return value."""

from __future__ import annotations

import pickle

import pytest

from trainers.utils import Error, Result, Success


def half(number: int) -> Result[int, str]:
    return Success(number // 2) if number % 2 == 0 else Error(f"{number} is odd")


def test_as_in_the_documentation() -> None:
    result = half(4)
    assert isinstance(result, Success)
    assert result.value == 2
    result = half(3)
    assert not isinstance(result, Success)
    assert result.error == "3 is odd"


@pytest.mark.parametrize("value", [1, None, "", False, [], "text"])
def test_success_with_any_value(value: object) -> None:
    result = Success(value)
    assert result.is_success is True
    assert result.is_error is False
    assert result.value == result.unwrap() == result.unwrap_or("other") == value
    assert isinstance(result, Result)
    with pytest.raises(AttributeError, match="no error"):
        _ = result.error


@pytest.mark.parametrize("error", ["bad", None, 3])
def test_error_with_any_error(error: object) -> None:
    result = Error(error)
    assert (result.is_success, result.is_error, result.error) == (False, True, error)
    assert result.unwrap_or(5) == 5
    with pytest.raises(AttributeError, match="no value"):
        _ = result.value
    with pytest.raises(ValueError, match=r"needs a Success: received Error"):
        result.unwrap()


def test_unwrapping_an_exception_names_it_as_the_cause() -> None:
    cause = OSError("disk full")
    with pytest.raises(ValueError, match="disk full") as raised:
        Error(cause).unwrap()
    assert raised.value.__cause__ is cause


def test_map_changes_one_side_only() -> None:
    assert half(4).map(str) == Success("2")
    assert half(3).map(str) == Error("3 is odd")
    assert half(4).map_error(len) == Success(2)
    assert half(3).map_error(len) == Error(8)


def test_equality_is_by_content_and_side() -> None:
    assert Success([1]) == Success([1])
    assert Success(1) != Success(2)
    assert Success("x") != Error("x")
    assert len({Success(1), Success(1), Error(1)}) == 2
    assert Success(1) != 1


def test_results_do_not_change_and_can_be_pickled() -> None:
    result = Success(1)
    with pytest.raises(AttributeError, match="cannot be changed"):
        result.value = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(result)) == result


def test_results_match_by_pattern() -> None:
    match half(3):
        case Success(value):
            pytest.fail(f"matched {value}")
        case Error(error):
            assert error == "3 is odd"
