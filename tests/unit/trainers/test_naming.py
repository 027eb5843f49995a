"""Names of experiments: legal, injective, in the documented forms."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.config import NamingStrategy, canonical_key
from trainers.config import naming as naming_module
from trainers.config.naming import experiment_names, legal_name
from trainers.config.validation import experiment_name_problem

MOMENT = datetime(2026, 1, 31, 12, 5, 9)
STRATEGIES = list(NamingStrategy)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    # Close to each other, to other types, to what names may not hold.
    st.sampled_from(
        ["1", "1.0", "True", "true", "none", "a", "A", "a.", "a..b", "x.lock", "a/b", "a b", "a_b", "-", ""]
    ),
    st.text("ab", min_size=100, max_size=260),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(
    ["model.name", "optimizer.name", "seed", "custom_params.seed", "custom_params.a b", "model.dropout"]
)
PARAMETERS = st.dictionaries(KEYS, VALUES, min_size=1, max_size=4)


def exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def names_of(parameters: list[dict[str, Any]], strategy: NamingStrategy, base: str = "run") -> list[str]:
    return experiment_names([base] * len(parameters), parameters, strategy, MOMENT)


def descriptions(key: str, values: list[Any]) -> list[str]:
    return [
        name.removeprefix("run_") for name in names_of([{key: value} for value in values], NamingStrategy.DESCRIPTIVE)
    ]


@given(
    st.lists(PARAMETERS, min_size=1, max_size=8, unique_by=exact), st.text(max_size=300), st.sampled_from(STRATEGIES)
)
def test_names_are_legal_and_differ_also_without_case(
    parameters: list[dict[str, Any]], base: str, strategy: NamingStrategy
) -> None:
    names = names_of(parameters, strategy, base)
    assert [experiment_name_problem(name) for name in names] == [None] * len(parameters)
    assert len({name.casefold() for name in names}) == len(parameters)


@given(st.text(max_size=250))
def test_any_text_becomes_a_legal_name(text: str) -> None:
    name = legal_name(text)
    assert experiment_name_problem(name) is None
    assert legal_name(name) == name
    if experiment_name_problem(text) is None:
        assert name == text


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "values",
    [
        [1.0, 10.0, 100.0],
        [1, 1.0, "1", True, "1.0", "true", "True"],
        [None, "none", "None", "", 0, False],
        [0.00012, 0.00014, 1e-5, 1.00000001e-5],
        ["a_long_name_" * 30 + "x", "a_long_name_" * 30 + "y"],
        ["Adam", "adam", "ADAM"],
        [[0.9, 0.999], [0.9, 0.99], [9, 0.99], "0.9_0.999"],
        ["a/b", "a_b", "a b", "a:b"],
    ],
)
def test_values_that_were_confused_before(values: list[Any], strategy: NamingStrategy) -> None:
    names = names_of([{"custom_params.value": value} for value in values], strategy)
    assert len({name.casefold() for name in names}) == len(values)
    assert not any(re.search(r"[^A-Za-z0-9._=+-]", name) for name in names)


def test_descriptive_values_read_as_they_are() -> None:
    values = [1.0, 1e-05, 0.1, -3, True, None, "adam", "res-net+2.1"]
    assert descriptions("custom_params.x", values) == [
        f"x={text}" for text in ["1.0", "1e-05", "0.1", "-3", "true", "none", "adam", "res-net+2.1"]
    ]


def test_descriptive_values_that_are_not_the_whole_truth_get_digits() -> None:
    for value in ["1", "true", "none", "nan", "", "a/b", "a.", "x.lock", "a..b", [1, 2], {"a": 1}]:
        (text,) = descriptions("custom_params.x", [value])
        assert re.fullmatch(r"x=.*-[0-9a-f]{8}", text), text
        assert text.endswith(hashlib.sha256(exact(value).encode()).hexdigest()[:8])


def test_descriptive_parameters_are_cut_at_120_characters() -> None:
    short, long = descriptions("custom_params.x", ["a" * 118, "a" * 119])
    assert short == "x=" + "a" * 118
    assert len(long) == 120
    assert re.fullmatch(r"x=a+-[0-9a-f]{8}", long)


def test_descriptive_keys_are_the_shortest_unambiguous_endings() -> None:
    parameters = {
        "model.name": "a",
        "optimizer.name": "b",
        "model.dropout": 0.5,
        "seed": 1,
        "custom_params.deep.seed": 2,
    }
    (name,) = names_of([parameters], NamingStrategy.DESCRIPTIVE)
    assert name == "run_model.name=a_optimizer.name=b_dropout=0.5_seed=1_deep.seed=2"


def test_hash_is_that_of_the_parameters() -> None:
    parameters = {"optimizer.learning_rate": 0.1, "model.hidden_size": 8}
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
    assert names_of([parameters], NamingStrategy.HASH_BASED) == [f"run_{digest[:8]}"]
    assert names_of([dict(reversed(parameters.items()))], NamingStrategy.HASH_BASED) == [f"run_{digest[:8]}"]
    assert names_of([parameters], NamingStrategy.TIMESTAMP_BASED) == [f"run_20260131_120509_{digest[:6]}"]


@pytest.mark.parametrize("strategy", [NamingStrategy.HASH_BASED, NamingStrategy.TIMESTAMP_BASED])
def test_colliding_hashes_get_more_digits(monkeypatch: pytest.MonkeyPatch, strategy: NamingStrategy) -> None:
    digests = iter(["ab" * 8 + "1" * 48, "ab" * 8 + "2" * 48, "cd" * 32])
    monkeypatch.setattr(naming_module, "_hash", lambda value: next(digests))
    first, second, third = names_of([{"seed": value} for value in range(3)], strategy)
    assert first != second
    assert first[:-4] == second[:-4]
    assert len(third) < len(first)


def test_sequential_numbers_have_at_least_four_digits() -> None:
    parameters = [{"seed": seed} for seed in range(10_001)]
    assert names_of(parameters[:11], NamingStrategy.SEQUENTIAL)[::10] == ["run_0000", "run_0010"]
    assert names_of(parameters, NamingStrategy.SEQUENTIAL)[::10_000] == ["run_00000", "run_10000"]


def test_equal_parameters_cannot_be_told_apart() -> None:
    with pytest.raises(ValueError, match="twice"):
        names_of([{"seed": 1}, {"seed": 1}], NamingStrategy.HASH_BASED)


def test_different_bases_do_not_collide() -> None:
    pairs = [
        ("run", {"custom_params.b": "1_c=2"}),
        ("run_b=x", {"custom_params.c": 2}),
        ("run", {"custom_params.b": "x_c=2"}),
    ]
    bases, parameters = zip(*pairs, strict=True)
    names = experiment_names(bases, parameters, NamingStrategy.DESCRIPTIVE)
    assert len(set(names)) == 3


def test_long_base_leaves_room_for_the_parameters() -> None:
    for strategy in STRATEGIES:
        names = names_of([{"seed": 1}, {"seed": 2}], strategy, "b" * 200)
        assert len(set(names)) == 2
        assert {len(name) for name in names} == {200}


def test_strategies_by_value() -> None:
    assert {strategy.value for strategy in NamingStrategy} == {
        "hash_based",
        "descriptive",
        "sequential",
        "timestamp_based",
    }
    assert NamingStrategy.PARAMETER_BASED is NamingStrategy.DESCRIPTIVE  # type: ignore[comparison-overlap]


def test_keys_above_are_those_of_the_schema() -> None:
    """The keys that the tests take for canonical ones are."""
    for key in itertools.chain(["custom_params.x", "optimizer.learning_rate"], ["model.name", "seed"]):
        assert canonical_key(key) == key
