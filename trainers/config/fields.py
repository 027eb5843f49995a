"""What the annotations of a configuration class say about its fields."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a dict"}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers", bool: "true or false", dict: "dicts"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration class.

    Attributes:
        name: Its canonical name.
        item: Type of the value, or of the entries of a list: str, int, float, bool, dict or a configuration class.
        is_list: Whether the value is a list.
        is_optional: Whether None is allowed.
        is_required: Whether it has no default.
    """

    name: str
    item: type
    is_list: bool
    is_optional: bool
    is_required: bool

    @property
    def is_section(self) -> bool:
        """Whether the value is an object of another configuration class."""
        return dataclasses.is_dataclass(self.item)

    @property
    def is_free(self) -> bool:
        """Whether the value is a dict of any content."""
        return self.item is dict

    @property
    def expected(self) -> str:
        """What the field accepts, in words."""
        kind = "a dict" if self.is_section else _WORDS[self.item]
        if self.is_list:
            kind = f"a list of {_PLURALS[self.item]}"
        return f"{kind} or null" if self.is_optional else kind


@functools.cache
def fields_of(configuration_class: type) -> dict[str, Field]:
    """Return the fields of a configuration class by name, in the order of its constructor.

    Args:
        configuration_class: A dataclass.

    Returns:
        Name to field; shared, so not to be changed.

    Example:
        >>> from trainers.config.schema import ModelConfig
        >>> fields_of(ModelConfig)["dropout"].expected
        'a number'
    """
    hints = typing.get_type_hints(configuration_class)
    return {
        field.name: _field(
            field.name,
            hints[field.name],
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(configuration_class)
    }


def _field(name: str, hint: Any, is_required: bool) -> Field:
    is_optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if is_optional:
        (hint,) = [choice for choice in typing.get_args(hint) if choice is not types.NoneType]
    is_list = typing.get_origin(hint) is list
    if is_list:
        (hint,) = typing.get_args(hint)
    return Field(name, typing.get_origin(hint) or hint, is_list, is_optional, is_required)
