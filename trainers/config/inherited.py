"""Fields that take the value of another section's field while they have none of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainers.config.fields import fields_of

# Inheriting field to its source; no source inherits itself.
INHERITED: dict[str, str] = {
    "data.batch_size": "training.batch_size",
    "data.num_workers": "performance.num_workers",
    "data.pin_memory": "performance.pin_memory",
    "optimizer.learning_rate": "training.learning_rate",
    "performance.gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "performance.clip_grad_norm": "training.max_grad_norm",
    "performance.dataloader_drop_last": "data.drop_last",
}


def fill_inherited(config: Any) -> None:
    """Give every inheriting field without a value that of its source.

    Args:
        config: An `ExperimentConfig`; its inheriting sections are replaced by copies, because other configurations
            may share them and have other sources.
    """
    for inheriting, source in INHERITED.items():
        section, name = inheriting.split(".")
        if getattr(getattr(config, section), name) is None:
            filled = dataclasses.replace(getattr(config, section), **{name: _value(config, source)})
            setattr(config, section, filled)


def inherited_keys(config: Any) -> set[str]:
    """Return the inheriting fields that have the value of their source.

    Args:
        config: An `ExperimentConfig`.

    Returns:
        Dotted keys. They are written as null: a change of the source then still reaches them.
    """
    return {key for key, source in INHERITED.items() if _value(config, key) == _value(config, source)}


def inheritance_warnings(content: Mapping[str, Any], schema: type) -> list[str]:
    """Return a text for each inheriting field that is set and differs from its source, which is set as well.

    A source that has its default does not count as set: a file that was saved names every field, so that it cannot be
    told whether somebody chose that value.

    Args:
        content: A configuration under canonical names.
        schema: The class of whole configurations.

    Returns:
        One text a field, each beginning with the dotted key.

    Example:
        >>> from trainers.config.schema import ExperimentConfig
        >>> inheritance_warnings({"data": {"batch_size": 8}, "training": {"batch_size": 16}}, ExperimentConfig)
        ['data.batch_size: 8 differs from training.batch_size = 16 and wins; set one of them']
    """
    texts = []
    for inheriting, source in INHERITED.items():
        own, other = _entry(content, inheriting), _entry(content, source)
        if own is not None and other not in (None, own, _default(schema, source)):
            texts.append(f"{inheriting}: {own!r} differs from {source} = {other!r} and wins; set one of them")
    return texts


def _value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _default(schema: type, key: str) -> Any:
    section, name = key.split(".")
    return getattr(fields_of(schema)[section].item, name)


def _entry(content: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return (content.get(section) or {}).get(name)
