"""From a dict to an experiment's configuration, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainers.config.conversion import typed_content
from trainers.config.environment import interpolation_warnings
from trainers.config.errors import ConfigurationError, ValidationError
from trainers.config.fields import Field, fields_of
from trainers.config.inherited import inheritance_warnings, inherited_keys
from trainers.config.plain import plain
from trainers.config.schema import ExperimentConfig
from trainers.config.validation import check_values

_LOGGER = logging.getLogger(__name__)


class Examined(NamedTuple):
    """A configuration and what was found about it.

    Attributes:
        content: What the dict sets, under canonical names and with the types of the schema.
        config: The configuration; where something is wrong, a default or a placeholder stands in.
        problems: One text a problem, each beginning with the dotted key.
        warnings: Likewise for what is accepted.
    """

    content: dict[str, Any]
    config: ExperimentConfig
    problems: list[str]
    warnings: list[str]


def create_experiment_config(config: Mapping[str, Any], source: str | None = None) -> ExperimentConfig:
    """Return the configuration that a dict describes, after checking everything about it.

    Strings are taken as they are: ``${...}`` is resolved in files only. Warnings go to the log.

    Args:
        config: Complete but for defaults, under any spelling; not changed.
        source: What errors call it, such as a file.

    Returns:
        The configuration, which shares nothing with the dict.

    Raises:
        ValidationError: Keys are unknown or missing, or values have wrong types or ranges; all are listed.
        ConfigurationError: No dict was given.

    Example:
        >>> config = create_experiment_config({"experiment_name": "first", "model": {"type": "mlp"}, "training": {},
        ...                                    "data": {"dataset_name": "digits"}, "optimizer": {}})
        >>> config.model.name, config.training.epochs
        ('mlp', 100)
    """
    examined = examine(config)
    report(examined, source)
    return examined.config


def report(examined: Examined, source: str | None = None) -> None:
    """Log the warnings and raise the problems.

    Args:
        examined: What `examine` returned.
        source: What the texts call the configuration.

    Raises:
        ValidationError: There are problems.
    """
    for text in examined.warnings:
        _LOGGER.warning("%s%s", "" if source is None else f"{source}: ", text)
    if examined.problems:
        raise ValidationError(examined.problems, source)


def examine(config: Mapping[str, Any]) -> Examined:
    """Return the configuration that a dict describes, and everything wrong or unusual about it.

    Args:
        config: Under any spelling; not changed.

    Returns:
        The findings; nothing is raised for them.

    Raises:
        ConfigurationError: No dict was given.

    Example:
        >>> examine({"experiment_name": "first"}).problems[0]
        'model: missing; expected a dict. Add it.'
    """
    if not isinstance(config, Mapping):
        raise ConfigurationError(f"The configuration: received {type(config).__name__}; expected a dict.")
    content, problems = typed_content(plain(config))
    built: ExperimentConfig = _built(ExperimentConfig, content, "", problems)
    found = check_values(built)
    warnings = [*inheritance_warnings(content, ExperimentConfig), *found.warnings, *interpolation_warnings(content)]
    return Examined(content, built, problems + found.problems, warnings)


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Return a configuration as a complete plain dict under canonical names.

    An inheriting field with the value of its source is None there, so that a change of the source reaches it.

    Args:
        config: The configuration.

    Returns:
        A dict that shares nothing with the configuration; `create_experiment_config` makes an equal one of it.

    Raises:
        ConfigurationError: ``config`` is no `ExperimentConfig`.

    Example:
        >>> config = create_experiment_config({"experiment_name": "first", "model": {"name": "mlp"}, "training": {},
        ...                                    "data": {"dataset_name": "digits"}, "optimizer": {}})
        >>> to_dict(config)["optimizer"]["eps"]
        1e-08
    """
    if not isinstance(config, ExperimentConfig):
        raise ConfigurationError(f"to_dict: received {type(config).__name__}; expected an ExperimentConfig.")
    inherited = inherited_keys(config)
    content = {}
    for field in fields_of(ExperimentConfig).values():
        value = getattr(config, field.name)
        if field.is_section and value is not None:
            content[field.name] = {
                name: None if f"{field.name}.{name}" in inherited else plain(getattr(value, name))
                for name in fields_of(field.item)
            }
        else:
            content[field.name] = plain(value)
    return content


def _built(configuration_class: type, content: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Build an object from typed content; what it lacks is added to ``problems`` and a placeholder stands in."""
    values = {}
    for field in fields_of(configuration_class).values():
        key = f"{prefix}{field.name}"
        value = content.get(field.name)
        if field.is_section and value is not None:
            values[field.name] = _built(field.item, value, f"{key}.", problems)
        elif field.name in content:
            values[field.name] = value
        elif field.is_required:
            # What was given but is wrong is reported already.
            if not any(text.startswith((f"{key}:", f"{key}.", f"{key}[")) for text in problems):
                problems.append(f"{key}: missing; expected {field.expected}. Add it.")
            values[field.name] = _placeholder(field)
    return configuration_class(**values)


def _placeholder(field: Field) -> Any:
    return _built(field.item, {}, "", []) if field.is_section else "missing"
