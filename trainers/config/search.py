"""Grid search: experiments from a base configuration and grids of parameters, all of them or an error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import datetime
from typing import Any

from trainers.config.combinations import (
    Combination,
    canonical_values,
    count_kept,
    matches,
    problems_of_combinations,
    problems_of_keys,
    texts_of,
)
from trainers.config.creation import create_experiment_config
from trainers.config.errors import ConfigurationError, ValidationError, problem
from trainers.config.grid import ParameterGrid
from trainers.config.grid_files import Compose, GridFile, read_grid_file, write_grid_file
from trainers.config.keys import with_value
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
            raise TypeError(
                f"naming_strategy: received {strategy!r}; expected one of {[str(known) for known in NamingStrategy]}"
            )
        self.naming_strategy = strategy

    def get_total_experiments(self) -> int:
        """Return how many experiments `generate_experiments` yields.

        Raises:
            ConfigurationError: An excluded combination has a key that is not in the schema.
        """
        return sum(count_kept(grid, self._exclusions()) for grid in self.parameter_grids)

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
        problems = problems_of_combinations(combinations, self._exclusions())
        if problems:
            raise ValidationError(problems, "the grid search")
        kept = [combination for combination in combinations if combination.excluded_by is None]
        bases = [str(self.base_config.get("experiment_name", combination.grid.name)) for combination in kept]
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
        return [canonical_values(pairs) for pairs in self.exclude_combinations]

    def _problems_of_grids(self) -> list[str]:
        """What is wrong with keys and counts, before any combination is made."""
        if not any(grid.parameters for grid in self.parameter_grids):
            count = len(self.parameter_grids)
            return [f"parameter_grids: received {count} grids, none with a parameter; expected at least one with some"]
        base_name = self.base_config.get("experiment_name", "")
        # As in the schema, whose text fields take numbers: a file may say `experiment_name: 2026`.
        problems = [] if type(base_name) in (str, int, float) else [problem("experiment_name", base_name, "text")]
        problems += [text for grid in self.parameter_grids for text in problems_of_keys(grid)]
        for index, pairs in enumerate(self.exclude_combinations):
            for key, value in pairs.items():
                try:
                    canonical_values({key: value})
                except ConfigurationError as error:
                    problems += [f"{text} (exclude_combinations[{index}])" for text in texts_of(error)]
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

    def _combinations(self) -> list[Combination]:
        exclusions = self._exclusions()
        combinations = []
        for grid in self.parameter_grids:
            for given in grid.generate_permutations():
                canonical = canonical_values(given)
                matching = (i for i, pairs in enumerate(exclusions) if matches(canonical, pairs))
                combinations.append(Combination(grid, given, canonical, next(matching, None)))
        return combinations

    def _build(self, combinations: Sequence[Combination], names: Sequence[str]) -> list[ExperimentConfig]:
        experiments = []
        problems: dict[str, list[str]] = {}
        for combination, name in zip(combinations, names, strict=True):
            try:
                experiments.append(
                    create_experiment_config(self._compose({**combination.given, "experiment_name": name}))
                )
            except ConfigurationError as error:
                for text in texts_of(error):
                    problems.setdefault(text, []).append(name)
        if problems:
            raise ValidationError([f"{text} ({_listed(own)})" for text, own in problems.items()], "the grid search")
        return experiments

    def _with_values(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        config = self.base_config
        for key, value in parameters.items():
            config = with_value(config, key, value)
        return config


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return (
        f"experiment {shown}"
        if len(names) == 1
        else f"{len(names)} experiments: {shown}" + (", ..." if len(names) > _SHOWN_NAMES else "")
    )
