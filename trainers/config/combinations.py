"""Combinations of parameters: under canonical names, counted, excluded, and what is wrong with them."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers.config.errors import ConfigurationError, ValidationError
from trainers.config.grid import ParameterGrid
from trainers.config.keys import canonical_key, with_value


@dataclass(frozen=True)
class Combination:
    """One combination of a grid.

    Attributes:
        grid: The grid.
        given: Keys and values as the grid spells them.
        canonical: The same as the schema spells them.
        excluded_by: Number of the first exclusion that matches it; None if none does.
    """

    grid: ParameterGrid
    given: dict[str, Any]
    canonical: dict[str, Any]
    excluded_by: int | None


def canonical_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys and values as the schema spells them: two spellings of one thing are equal then.

    Args:
        given: Dotted keys in any spelling, to values.

    Returns:
        The same in the same order.

    Raises:
        ConfigurationError: A key is not in the schema, or a value does not fit its spelling.

    Example:
        >>> canonical_values({"slurm.gpus_per_node": 2})
        {'slurm.gres': 'gpu:2'}
    """
    canonical = {}
    for key, value in given.items():
        name = canonical_key(key)
        entry: Any = with_value({}, key, value)
        for part in name.split("."):
            entry = entry[part]
        canonical[name] = entry
    return canonical


def problems_of_keys(grid: ParameterGrid) -> list[str]:
    """Return what is wrong with the keys of a grid and with single values.

    Args:
        grid: The grid.

    Returns:
        One text a problem, each beginning with the key.
    """
    names: dict[str, str] = {}
    problems = []
    where = f"(grid {grid.name!r})"
    for key in grid.parameters:
        try:
            name = canonical_key(key)
        except ConfigurationError as error:
            problems += [f"{text} {where}" for text in texts_of(error)]
            continue
        if name == "experiment_name":
            problems.append(f"{key}: cannot be a parameter, because the naming strategy names experiments {where}")
        if name in names:
            problems.append(f"{key}: means the same as {names[name]}; expected one of them {where}")
        for other in names:
            if other.startswith(f"{name}.") or name.startswith(f"{other}."):
                problems.append(
                    f"{key}: one of it and {names[other]} lies inside the other; expected one of them {where}"
                )
        names[name] = key
        for value in grid.parameters[key]:
            try:
                canonical_values({key: value})
            except ConfigurationError as error:
                problems += [f"{text} {where}" for text in texts_of(error)]
    return problems


def problems_of_combinations(combinations: Sequence[Combination], exclusions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the combinations of all grids together.

    Args:
        combinations: All of them, the excluded ones too.
        exclusions: Pairs of canonical keys and values; a combination that matches all pairs of one is excluded.

    Returns:
        One text for each combination that occurs twice and each exclusion without effect.
    """
    uses = Counter(_exact(combination.canonical) for combination in combinations)
    problems = []
    for text in [text for text, count in uses.items() if count > 1]:
        grids = [item.grid.name for item in combinations if _exact(item.canonical) == text]
        problems.append(
            f"parameter_grids: received the combination {text} {len(grids)} times, in {grids}; expected once"
        )
    if all(combination.excluded_by is not None for combination in combinations):
        problems.append("exclude_combinations: all combinations are excluded; expected some to be left")
    for index, pairs in enumerate(exclusions):
        if not any(matches(combination.canonical, pairs) for combination in combinations):
            problems.append(
                f"exclude_combinations[{index}]: received {pairs}, which matches no combination of any grid"
            )
    return problems


def _exact(value: Any) -> str:
    """A text that is equal for equal values of the same type only: 1, 1.0, True and "1" differ."""
    return json.dumps(value, sort_keys=True)


def matches(parameters: Mapping[str, Any], pairs: Mapping[str, Any]) -> bool:
    """Whether parameters have all these values; numbers are compared by value, all else by type as well.

    Args:
        parameters: Canonical keys to values.
        pairs: Canonical keys to values.

    Example:
        >>> matches({"seed": 1, "version": "2"}, {"seed": 1.0}), matches({"seed": 1}, {"seed": "1"})
        (True, False)
    """
    return all(key in parameters and _same(parameters[key], value) for key, value in pairs.items())


def _same(first: Any, second: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return bool(first == second) if numbers else _exact(first) == _exact(second)


def count_kept(grid: ParameterGrid, exclusions: Sequence[Mapping[str, Any]]) -> int:
    """Return how many combinations of a grid are not excluded.

    Only the values of keys that an exclusion names are gone through one by one.

    Args:
        grid: The grid.
        exclusions: As for `problems_of_combinations`.
    """
    named = {key: canonical_key(key) for key in grid.parameters} if exclusions else {}
    relevant = [pairs for pairs in exclusions if pairs.keys() <= set(named.values())]
    excluding = [key for key, name in named.items() if any(name in pairs for pairs in relevant)]
    if not excluding:
        return grid.get_parameter_count()
    kept = 0
    for values in itertools.product(*(grid.parameters[key] for key in excluding)):
        canonical = canonical_values(dict(zip(excluding, values, strict=True)))
        kept += not any(matches(canonical, pairs) for pairs in relevant)
    return kept * math.prod(len(values) for key, values in grid.parameters.items() if key not in excluding)


def texts_of(error: ConfigurationError) -> list[str]:
    """Return the problems that an error lists, or its own text.

    Args:
        error: The error.
    """
    return error.problems if isinstance(error, ValidationError) else [str(error)]
