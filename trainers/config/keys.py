"""Dotted keys: `model.hidden_size` names a field of the schema, or an entry of a free-form dict at any depth."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from trainers.config.errors import ConfigurationError, ValidationError, problem
from trainers.config.fields import Field, fields_of
from trainers.config.plain import plain
from trainers.config.schema import ExperimentConfig
from trainers.config.spellings import OTHER_SPELLINGS, canonical_section


def canonical_key(dotted: str) -> str:
    """Return a dotted key under the canonical names of the schema.

    Some spellings mean another value than the canonical field (`preemption.max_checkpoint_sec` counts seconds), so
    the key as it was given, not the canonical one, is what belongs to a value: `with_value` takes it.

    Args:
        dotted: Such as ``"model.type"``; anything may follow the key of a free-form dict.

    Returns:
        The canonical key: equal for two spellings of one field.

    Raises:
        ConfigurationError: The key is not in the schema; the message names the closest legal one.

    Example:
        >>> canonical_key("model.type")
        'model.name'
        >>> canonical_key("model.custom_params.kernel.width")
        'model.custom_params.kernel.width'
    """
    if not isinstance(dotted, str) or not all(dotted.split(".")):
        raise ConfigurationError(problem(str(dotted), dotted, "a dotted key such as model.hidden_size"))
    _, names = field_at(dotted)
    return ".".join(names)


def field_at(dotted: str) -> tuple[Field, list[str]]:
    """Return the field that a dotted key names or lies below, and the parts of the key under canonical names.

    Args:
        dotted: A dotted key without empty parts.

    Returns:
        The field, a free-form dict if parts of the key follow it, and the parts.

    Raises:
        ConfigurationError: The key is not in the schema.
    """
    first, *rest = dotted.split(".")
    field = fields_of(ExperimentConfig).get(first)
    if field is None:
        raise ConfigurationError(unknown_key(dotted))
    if not rest or field.is_free:
        return field, [first, *rest]
    if not field.is_section:
        raise ConfigurationError(_no_way_through(dotted, first, field))
    name, *rest = rest
    name = OTHER_SPELLINGS[first].get(name, name)
    field = fields_of(field.item).get(name)
    if field is None:
        raise ConfigurationError(unknown_key(dotted))
    if rest and not field.is_free:
        raise ConfigurationError(_no_way_through(dotted, f"{first}.{name}", field))
    return field, [first, name, *rest]


def unknown_key(dotted: str) -> str:
    """Return the text of the problem that a dotted key is not in the schema, with the closest legal one.

    Args:
        dotted: The unknown key.

    Returns:
        A text that begins with the key.

    Example:
        >>> unknown_key("model.hiden_size")
        "model.hiden_size: no key of the schema. Did you mean 'model.hidden_size'?"
    """
    closest = _closest(dotted)
    fix = f"Did you mean {closest!r}?" if closest else "Entries of your own belong into custom_params."
    return f"{dotted}: no key of the schema. {fix}"


def with_value(config_dict: Mapping[str, Any], dotted_key: str, value: Any) -> dict[str, Any]:
    """Return a copy of a configuration in which one key has another value.

    A dict given for a section is merged into it; one given for a field, a free-form dict included, replaces it.

    Args:
        config_dict: A configuration under any spelling; not changed.
        dotted_key: Key in any spelling; sections and dicts on the way to it are created.
        value: The new value, which belongs to the key as it is spelled; copied.

    Returns:
        The copy, under canonical names.

    Raises:
        ConfigurationError: The key is not in the schema, or a value that is no dict lies on the way to it.
        ValidationError: A field is given twice, or the value does not fit its spelling.

    Example:
        >>> with_value({"slurm": None}, "slurm.gpus_per_node", 2)
        {'slurm': {'gres': 'gpu:2'}}
    """
    copy = plain(config_dict)
    assign(copy, dotted_key, plain(value))
    content, problems = canonical_names(copy)
    if problems:
        raise ValidationError(problems)
    return content


def assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted key in a tree whose spellings need not be canonical.

    Args:
        tree: Changed in place.
        dotted: Key in any spelling; other spellings of it are dropped from the tree.
        value: The new value.

    Raises:
        ConfigurationError: As for `with_value`.
    """
    canonical_key(dotted)
    *above, last = dotted.split(".")
    node = tree
    for depth, name in enumerate(above):
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            here = ".".join(above[: depth + 1])
            raise ConfigurationError(problem(dotted, node, f"a dict at {here}", f"Change {here} itself."))
    if len(above) == 1:
        drop_spellings(above[0], node, [last])
    below = node.get(last)
    is_section = not above and fields_of(ExperimentConfig)[last].is_section
    if is_section and isinstance(below, dict) and isinstance(value, dict):
        drop_spellings(last, below, value)
        below.update(value)
    else:
        node[last] = value


def drop_spellings(section: str, content: dict[Any, Any], keys: Iterable[Any]) -> None:
    """Remove from a section what the keys spell in another way: they are about to get values.

    Args:
        section: Name of the section.
        content: Its content, changed in place.
        keys: Keys in any spelling.
    """
    others = OTHER_SPELLINGS.get(section, {})
    names = {others.get(key, key) for key in keys}
    for spelling in [key for key in content if others.get(key, key) in names and key not in keys]:
        del content[spelling]


def canonical_names(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration under canonical names; unknown keys stay as they are.

    Args:
        config: A configuration or a part of one, under any spelling; not changed.

    Returns:
        The configuration and one text a problem, as `canonical_section` gives them.
    """
    content: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in config.items():
        if name in OTHER_SPELLINGS and isinstance(value, Mapping):
            value, found = canonical_section(name, value)
            problems += found
        content[name] = value
    return content, problems


def _no_way_through(dotted: str, above: str, field: Field) -> str:
    return f"{dotted}: {above} is {field.expected} and has no keys below it. Set {above} itself."


@functools.cache
def _legal_keys() -> dict[str, list[str]]:
    """Section, empty for all of them, to what a mistaken key may have meant."""
    top = fields_of(ExperimentConfig)
    keys = {
        name: [f"{name}.{key}" for key in (*fields_of(field.item), *OTHER_SPELLINGS[name])]
        for name, field in top.items()
        if field.is_section
    }
    return {**keys, "": [*top, *(key for section in keys.values() for key in section)]}


def _closest(dotted: str) -> str | None:
    first, _, last = dotted.rpartition(".")
    everywhere = _legal_keys()[""]
    within = _legal_keys().get(first) if first else None
    # The right name in the wrong section is likelier than a similar name in the right one.
    close = [key for key in everywhere if key.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(dotted, within or everywhere, n=1, cutoff=0 if within else 0.5)
    if not close:
        return None
    section, _, name = close[0].partition(".")
    return f"{section}.{OTHER_SPELLINGS[section].get(name, name)}" if name else section
