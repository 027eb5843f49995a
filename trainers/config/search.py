"""Grid search: experiments from a base configuration and grids of parameters, all of them or an error."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trainers.config.creation import create_experiment_config
from trainers.config.errors import ConfigurationError, ValidationError, problem
from trainers.config.grid import ParameterGrid
from trainers.config.grid_files import Compose, GridFile, read_grid_file, write_grid_file
from trainers.config.keys import canonical_key, with_value
from trainers.config.naming import NamingStrategy, experiment_names
from trainers.config.schema import ExperimentConfig

MAX_COMBINATIONS = 10_000
# Of experiments with the same problem, so many are named.
_SHOWN_NAMES = 3


class ParameterGridSearch:
    """Experiments for every combination of one or more grids, one grid after another.

    Each experiment is the untouched base configuration with the values of one combination.

    Args:
        base_config: What all experiments share; copied. Its ``experiment_name`` begins every name; without one, the
            grid's name does.
        name: What the search is called.
        description: What it is for.
        max_combinations: More experiments than these are an error.
        exclude_combinations: Dicts of keys and values; a combination that matches all pairs of one is left out.
        compose: Returns the base configuration with some parameters set, keys in any spelling to values. Default:
            sets them in a copy of ``base_config``. A base from a file resolves its ``${...}`` here, after they are set.

    Attributes:
        base_config: An equal copy of what was given.
        parameter_grids: The grids.
        naming_strategy: How experiments are called.
        name: As given.
        description: As given.
        max_combinations: As given.
        exclude_combinations: As given.

    Raises:
        TypeError: The base configuration is no dict.

    Example:
        >>> base = {"experiment_name": "run", "model": {"name": "mlp"}, "training": {}, "optimizer": {}}
        >>> search = ParameterGridSearch({**base, "data": {"dataset_name": "digits"}})
        >>> search.create_grid("rates").add_parameter("optimizer.lr", [0.1, 0.01])
        >>> search.set_naming_strategy(NamingStrategy.DESCRIPTIVE)
        >>> [experiment.experiment_name for experiment in search.generate_experiments()]
        ['run_learning_rate=0.1', 'run_learning_rate=0.01']
    """

    def __init__(
        self,
        base_config: Mapping[str, Any],
        *,
        name: str = "",
        description: str = "",
        max_combinations: int = MAX_COMBINATIONS,
        exclude_combinations: Sequence[Mapping[str, Any]] = (),
        compose: Compose | None = None,
    ) -> None:
        if not isinstance(base_config, Mapping):
            raise TypeError(f"base_config: received a {type(base_config).__name__}; expected a dict")
        self.base_config: dict[str, Any] = deepcopy(dict(base_config))
        self.parameter_grids: list[ParameterGrid] = []
        self.naming_strategy = NamingStrategy.HASH_BASED
        self.name = name
        self.description = description
        self.max_combinations = max_combinations
        self.exclude_combinations = [dict(pairs) for pairs in exclude_combinations]
        self._compose = self._with_values if compose is None else compose

    def add_grid(self, grid: ParameterGrid) -> None:
        """Add a grid, whose experiments follow those of the grids before it.

        Args:
            grid: The grid itself, not a copy: parameters may be added later.

        Raises:
            TypeError: It is no `ParameterGrid`.
        """
        if not isinstance(grid, ParameterGrid):
            raise TypeError(f"add_grid: received {grid!r}; expected a ParameterGrid")
        self.parameter_grids.append(grid)

    def create_grid(self, name: str, description: str = "") -> ParameterGrid:
        """Add an empty grid and return it.

        Args:
            name: What to call it.
            description: What it is for.

        Returns:
            The grid, to be filled with `ParameterGrid.add_parameter`.
        """
        grid = ParameterGrid(name, description)
        self.add_grid(grid)
        return grid

    def set_naming_strategy(self, strategy: NamingStrategy) -> None:
        """Choose how experiments are called.

        Args:
            strategy: The strategy; `NamingStrategy.HASH_BASED` if this is not called.

        Raises:
            TypeError: It is no `NamingStrategy`.
        """
        if not isinstance(strategy, NamingStrategy):
            raise TypeError(f"received {strategy!r}; expected one of {[str(known) for known in NamingStrategy]}")
        self.naming_strategy = strategy

    def get_total_experiments(self) -> int:
        """Return how many experiments `generate_experiments` yields.

        Raises:
            ConfigurationError: An excluded combination has a key that is not in the schema.
        """
        return sum(_count(grid, self._exclusions()) for grid in self.parameter_grids)

    def validate_grids(self) -> list[str]:
        """Return everything that would keep `generate_experiments` from yielding; empty if nothing does."""
        try:
            self.named_experiments()
        except ValidationError as error:
            return error.problems
        return []

    def generate_experiments(self) -> Iterator[ExperimentConfig]:
        """Return all experiments, in the order of the grids, the last key of each changing fastest.

        Everything is checked before the first is returned, and all problems are reported together.

        Returns:
            The configurations, each under its name.

        Raises:
            ValidationError: A key is not in the schema, is given under two spellings, or lies inside another; there
                is no grid, or no combination; a combination occurs twice; there are too many; an exclusion matches
                nothing; or experiments are invalid.
        """
        return iter(self.named_experiments())

    def named_experiments(self, moment: datetime | None = None) -> list[ExperimentConfig]:
        """Return what `generate_experiments` yields, as a list.

        Args:
            moment: When the search was made, for names with a time. Default: now.

        Raises:
            ValidationError: As there.
        """
        problems = self._problems_of_grids()
        if problems:
            raise ValidationError(problems, "the grid search")
        combinations = self._combinations()
        problems = _problems_of_combinations(combinations, self._exclusions())
        if problems:
            raise ValidationError(problems, "the grid search")
        kept = [combination for combination in combinations if combination.excluded_by is None]
        bases = [self.base_config.get("experiment_name", combination.grid.name) for combination in kept]
        names = experiment_names(bases, [item.canonical for item in kept], self.naming_strategy, moment)
        return self._build(kept, names)

    def save_grid_config(self, path: str | os.PathLike[str]) -> None:
        """Write the base configuration, the grids and all settings to a JSON file, whole or not at all.

        Args:
            path: Where to; missing folders are made.

        Raises:
            ValidationError: The base configuration holds something that JSON cannot.
        """
        write_grid_file(
            path,
            GridFile(
                base_config=self.base_config,
                grids=self.parameter_grids,
                naming_strategy=self.naming_strategy,
                name=self.name,
                description=self.description,
                max_combinations=self.max_combinations,
                exclude_combinations=self.exclude_combinations,
            ),
        )

    @classmethod
    def load_grid_config(cls, path: str | os.PathLike[str]) -> ParameterGridSearch:
        """Return the search that a JSON file describes.

        Args:
            path: A file that `save_grid_config` wrote or somebody did: ``name``, ``description``, ``base_config`` or
                ``base_config_path`` (relative to the file), ``naming_strategy``, ``grids`` (each with ``name``,
                ``description`` and ``parameters``), ``constraints`` with ``max_combinations`` (default 10 000) and
                ``exclude_combinations``.

        Returns:
            A new search.

        Raises:
            ConfigurationError: The file is missing, is no JSON, or has unknown, missing or wrong entries.
        """
        read = read_grid_file(path, MAX_COMBINATIONS)
        search = cls(
            read.base_config,
            name=read.name,
            description=read.description,
            max_combinations=read.max_combinations,
            exclude_combinations=read.exclude_combinations,
            compose=read.compose,
        )
        for grid in read.grids:
            search.add_grid(grid)
        search.set_naming_strategy(read.naming_strategy)
        return search

    def _exclusions(self) -> list[dict[str, Any]]:
        return [_canonical(pairs) for pairs in self.exclude_combinations]

    def _problems_of_grids(self) -> list[str]:
        """What is wrong with keys and counts, before any combination is made."""
        if not any(grid.parameters for grid in self.parameter_grids):
            count = len(self.parameter_grids)
            return [f"parameter_grids: received {count} grids, none with a parameter; expected at least one with some"]
        base_name = self.base_config.get("experiment_name", "")
        problems = [] if isinstance(base_name, str) else [problem("experiment_name", base_name, "text")]
        problems += [text for grid in self.parameter_grids for text in _problems_of_keys(grid)]
        for index, pairs in enumerate(self.exclude_combinations):
            for key, value in pairs.items():
                try:
                    _canonical({key: value})
                except ConfigurationError as error:
                    problems += [f"{text} (exclude_combinations[{index}])" for text in _texts(error)]
            if not pairs:
                problems.append(
                    f"exclude_combinations[{index}]: received no pair; expected at least one key with a value"
                )
        if not problems:
            total = self.get_total_experiments()
            if total > self.max_combinations:
                problems.append(
                    f"max_combinations: received grids of {total} combinations; expected at most "
                    f"{self.max_combinations}. Split the search or raise max_combinations."
                )
        return problems

    def _combinations(self) -> list[_Combination]:
        exclusions = self._exclusions()
        combinations = []
        for grid in self.parameter_grids:
            for given in grid.generate_permutations():
                canonical = _canonical(given)
                matching = (i for i, pairs in enumerate(exclusions) if _matches(canonical, pairs))
                combinations.append(_Combination(grid, given, canonical, next(matching, None)))
        return combinations

    def _build(self, combinations: Sequence[_Combination], names: Sequence[str]) -> list[ExperimentConfig]:
        experiments = []
        problems: dict[str, list[str]] = {}
        for combination, name in zip(combinations, names, strict=True):
            try:
                experiments.append(
                    create_experiment_config(self._compose({**combination.given, "experiment_name": name}))
                )
            except ConfigurationError as error:
                for text in _texts(error):
                    problems.setdefault(text, []).append(name)
        if problems:
            raise ValidationError([f"{text} ({_listed(own)})" for text, own in problems.items()], "the grid search")
        return experiments

    def _with_values(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        config = self.base_config
        for key, value in parameters.items():
            config = with_value(config, key, value)
        return config


@dataclass(frozen=True)
class _Combination:
    """One combination: as the grid spells it, under canonical names, and the first exclusion that matches it."""

    grid: ParameterGrid
    given: dict[str, Any]
    canonical: dict[str, Any]
    excluded_by: int | None


def _canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys and values as the schema spells them: two spellings of one thing are equal then."""
    canonical = {}
    for key, value in given.items():
        name = canonical_key(key)
        entry: Any = with_value({}, key, value)
        for part in name.split("."):
            entry = entry[part]
        canonical[name] = entry
    return canonical


def _problems_of_keys(grid: ParameterGrid) -> list[str]:
    names: dict[str, str] = {}
    problems = []
    where = f"(grid {grid.name!r})"
    for key in grid.parameters:
        try:
            name = canonical_key(key)
        except ConfigurationError as error:
            problems += [f"{text} {where}" for text in _texts(error)]
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
                _canonical({key: value})
            except ConfigurationError as error:
                problems += [f"{text} {where}" for text in _texts(error)]
    return problems


def _problems_of_combinations(
    combinations: Sequence[_Combination], exclusions: Sequence[Mapping[str, Any]]
) -> list[str]:
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
        if not any(_matches(combination.canonical, pairs) for combination in combinations):
            problems.append(
                f"exclude_combinations[{index}]: received {pairs}, which matches no combination of any grid"
            )
    return problems


def _exact(value: Any) -> str:
    """A text that is equal for equal values of the same type only: 1, 1.0, True and "1" differ."""
    return json.dumps(value, sort_keys=True)


def _matches(parameters: Mapping[str, Any], pairs: Mapping[str, Any]) -> bool:
    return all(key in parameters and _same(parameters[key], value) for key, value in pairs.items())


def _same(first: Any, second: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return bool(first == second) if numbers else _exact(first) == _exact(second)


def _count(grid: ParameterGrid, exclusions: Sequence[Mapping[str, Any]]) -> int:
    """How many combinations are not excluded; only keys that an exclusion names are gone through one by one."""
    named = {key: canonical_key(key) for key in grid.parameters} if exclusions else {}
    relevant = [pairs for pairs in exclusions if pairs.keys() <= set(named.values())]
    excluding = [key for key, name in named.items() if any(name in pairs for pairs in relevant)]
    if not excluding:
        return grid.get_parameter_count()
    kept = 0
    for values in itertools.product(*(grid.parameters[key] for key in excluding)):
        canonical = _canonical(dict(zip(excluding, values, strict=True)))
        kept += not any(_matches(canonical, pairs) for pairs in relevant)
    return kept * math.prod(len(values) for key, values in grid.parameters.items() if key not in excluding)


def _texts(error: ConfigurationError) -> list[str]:
    return error.problems if isinstance(error, ValidationError) else [str(error)]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return (
        f"experiment {shown}"
        if len(names) == 1
        else f"{len(names)} experiments: {shown}" + (", ..." if len(names) > _SHOWN_NAMES else "")
    )
