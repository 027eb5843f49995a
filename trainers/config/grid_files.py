"""Grid searches as JSON files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigurationError, MissingConfiguration, UnsupportedFormat, ValidationError
from trainers.config.files import read_tree, write_atomically, written
from trainers.config.grid import ParameterGrid
from trainers.config.manager import ConfigurationManager
from trainers.config.naming import NamingStrategy
from trainers.config.plain import plain, plain_problems

# What may stand in each part of a file, and the type of it.
_FILE: dict[str, type] = {
    "name": str,
    "description": str,
    "base_config": dict,
    "base_config_path": str,
    "naming_strategy": str,
    "grids": list,
    "constraints": dict,
}
_GRID: dict[str, type] = {"name": str, "description": str, "parameters": dict}
_CONSTRAINTS: dict[str, type] = {"max_combinations": int, "exclude_combinations": list}
_WORDS: dict[type, str] = {str: "text", dict: "an object", list: "a list", int: "a whole number"}


Compose = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class GridFile:
    """Content of a file; the attributes are those of `ParameterGridSearch`."""

    base_config: dict[str, Any]
    grids: Sequence[ParameterGrid]
    naming_strategy: NamingStrategy
    name: str
    description: str
    max_combinations: int
    exclude_combinations: Sequence[dict[str, Any]]
    compose: Compose | None = None


def write_grid_file(path: str | os.PathLike[str], content: GridFile) -> None:
    """Write a file, whole or not at all.

    Args:
        path: Where to; missing folders are made.
        content: What to write.

    Raises:
        UnsupportedFormat: The file's name does not end in ``.json``.
        ValidationError: Something in it cannot be written as JSON and read back equal.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise UnsupportedFormat(f"{path}: received suffix {path.suffix!r}; expected .json")
    document = plain(
        {
            "name": content.name,
            "description": content.description,
            "base_config": content.base_config,
            "naming_strategy": content.naming_strategy.value,
            "grids": [
                {"name": grid.name, "description": grid.description, "parameters": grid.parameters}
                for grid in content.grids
            ],
            "constraints": {
                "max_combinations": content.max_combinations,
                "exclude_combinations": list(content.exclude_combinations),
            },
        }
    )
    problems = plain_problems(document, "")
    if problems:
        raise ValidationError(problems, str(path))
    write_atomically(path, written(document, "json"))


def read_grid_file(path: str | os.PathLike[str], max_combinations: int) -> GridFile:
    """Read a file.

    Args:
        path: The file.
        max_combinations: For a file that does not give it.

    Returns:
        Its content, with the base configuration that it names read as well.

    Raises:
        ConfigurationError: The file is missing (also a ``FileNotFoundError``), is no JSON, or has unknown, missing or
            wrong entries.
    """
    path = Path(path)
    document = _checked(_read(path), _FILE, str(path))
    constraints = _checked(document.get("constraints", {}), _CONSTRAINTS, f"{path}: constraints")
    excluded = constraints.get("exclude_combinations", [])
    for index, pairs in enumerate(excluded):
        if not isinstance(pairs, dict):
            raise ConfigurationError(
                f"{path}: constraints.exclude_combinations[{index}]: received {pairs!r}; expected an object of keys "
                "with a value each"
            )
    strategies = [strategy.value for strategy in NamingStrategy]
    strategy = document.get("naming_strategy", NamingStrategy.HASH_BASED.value)
    if strategy not in strategies:
        raise ConfigurationError(f"{path}: naming_strategy: received {strategy!r}; expected one of {strategies}")
    if "grids" not in document:
        raise ConfigurationError(f"{path}: the key 'grids' is missing; expected a list of grids")
    base_config, compose = _base_config(document, path)
    return GridFile(
        base_config=base_config,
        grids=[_grid(entry, f"{path}: grids[{index}]") for index, entry in enumerate(document["grids"])],
        naming_strategy=NamingStrategy(strategy),
        name=document.get("name", ""),
        description=document.get("description", ""),
        max_combinations=constraints.get("max_combinations", max_combinations),
        exclude_combinations=excluded,
        compose=compose,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_tree(path, path.read_bytes())
    except FileNotFoundError as error:
        raise MissingConfiguration(f"{path.absolute()} does not exist; expected a grid search as JSON") from error


def _checked(entries: Any, kinds: dict[str, type], where: str) -> dict[str, Any]:
    if not isinstance(entries, dict):
        raise ConfigurationError(f"{where}: received {entries!r}; expected an object with the keys {list(kinds)}")
    for key, value in entries.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            fix = f"Did you mean {close[0]!r}?" if close else f"Expected one of {list(kinds)}."
            raise ConfigurationError(f"{where}: received the unknown key {key!r}. {fix}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ConfigurationError(f"{where}: {key}: received {value!r}; expected {_WORDS[kinds[key]]}")
    return entries


def _grid(entry: Any, where: str) -> ParameterGrid:
    entries = _checked(entry, _GRID, where)
    if "name" not in entries:
        raise ConfigurationError(f"{where}: the key 'name' is missing; expected what the grid is called")
    grid = ParameterGrid(entries["name"], entries.get("description", ""))
    for key, values in entries.get("parameters", {}).items():
        try:
            grid.add_parameter(key, values)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{where}: {error}") from error
    return grid


def base_from_file(manager: ConfigurationManager, path: str | Path) -> tuple[dict[str, Any], Compose]:
    """Read a base configuration.

    Args:
        manager: Finds and reads it.
        path: The file.

    Returns:
        Its content, and a function that returns it with some parameters set. Only then ``${...}`` is resolved: what
        says ``runs/${experiment_name}`` differs for each experiment.
    """

    def compose(parameters: Mapping[str, Any]) -> dict[str, Any]:
        return manager.compose_configs(path, parameter_overrides=parameters)

    return manager.load_config(path, validate=False), compose


def _base_config(document: dict[str, Any], path: Path) -> tuple[dict[str, Any], Compose | None]:
    if ("base_config" in document) == ("base_config_path" in document):
        received = "both" if "base_config" in document else "neither"
        raise ConfigurationError(f"{path}: received {received} of base_config and base_config_path; expected one")
    if "base_config" in document:
        return document["base_config"], None
    folder = path.parent.absolute()
    return base_from_file(ConfigurationManager(folder, config_dir=folder), folder / document["base_config_path"])
