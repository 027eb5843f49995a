"""Content of a configuration as the schema types it: every field converted, everything wrong reported at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainers.config.errors import ConfigurationError, problem
from trainers.config.fields import Field, fields_of
from trainers.config.keys import canonical_key, canonical_names, unknown_key
from trainers.config.plain import plain_problems
from trainers.config.schema import ExperimentConfig


def typed_content(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a configuration under canonical names and with the types of the schema.

    Args:
        config: Plain values under any spelling; not changed.

    Returns:
        What the configuration sets, no defaults added and without what is wrong, and one text a problem.

    Example:
        >>> typed_content({"training": {"max_epochs": "3", "batchsize": 8}})
        ({'training': {'epochs': 3}}, ["training.batchsize: no key of the schema. Did you mean 'training.batch_size'?"])
    """
    content, problems = canonical_names(config)
    typed: dict[str, Any] = {}
    for name, value in content.items():
        field = fields_of(ExperimentConfig).get(name)
        if field is None or not field.is_section:
            _add_typed(ExperimentConfig, name, value, name, typed, problems)
        elif isinstance(value, dict):
            typed[name] = {}
            for below, entry in value.items():
                _add_typed(field.item, below, entry, f"{name}.{below}", typed[name], problems)
        elif value is None and (field.is_optional or not field.is_required):
            typed[name] = None if field.is_optional else {}
        else:
            problems.append(problem(name, value, f"{field.expected}; {{}} stands for the defaults"))
    return typed, problems


def _add_typed(
    section_class: type, name: Any, value: Any, key: str, typed: dict[str, Any], problems: list[str]
) -> None:
    """Add the converted value to ``typed``, or what is wrong with it to ``problems``."""
    field = fields_of(section_class).get(name)
    if not isinstance(name, str):
        problems.append(problem(key, name, "text as key", "Quote the key."))
    elif field is None:
        problems.append(_nested_key(key) if "." in name else unknown_key(key))
    elif found := plain_problems(value, key):
        problems += found
    else:
        try:
            typed[name] = _converted(section_class, field, value)
        except ValueError:
            problems.append(problem(key, value, field.expected))


def _nested_key(key: str) -> str:
    try:
        legal = canonical_key(key)
    except ConfigurationError:
        return unknown_key(key)
    return f"{key}: dotted keys belong into parameter_overrides or a grid. Nest the dicts to set {legal} here."


def _converted(section_class: type, field: Field, value: Any) -> Any:
    if value is None and field.is_optional:
        return None
    if field.is_free:
        return _checked(value, isinstance(value, dict))
    if field.is_list:
        _checked(value, isinstance(value, list))
        return [_converted_item(section_class, field, entry) for entry in value]
    return _converted_item(section_class, field, value)


def _checked(value: Any, is_accepted: bool) -> Any:
    if not is_accepted:
        raise ValueError
    return value


def _converted_item(section_class: type, field: Field, value: Any) -> Any:
    if type(value) is field.item:
        return value
    _checked(value, isinstance(value, (bool, int, float, str)))
    if field.item is bool:
        # Every number, written as text too, would convert.
        is_word = isinstance(value, str) and not value.strip().lstrip("+-").isdigit()
        _checked(value, is_word or value in (0, 1, "0", "1"))
    else:
        _checked(value, not isinstance(value, bool))
    if field.item is int and isinstance(value, float):
        # 1e5 is a natural way to write a number of steps.
        return int(_checked(value, value.is_integer()))
    # Interpolations are resolved in files only; OmegaConf would resolve them here as well.
    _checked(value, not (isinstance(value, str) and "${" in value))
    # Conversions belong to update; plain assignment is losing them.
    node = OmegaConf.structured(section_class)
    try:
        OmegaConf.update(node, field.name, [value] if field.is_list else value)
        converted = node[field.name][0] if field.is_list else node[field.name]
    except OmegaConfBaseException as error:
        raise ValueError from error
    return _checked(converted, not isinstance(converted, float) or math.isfinite(converted))
