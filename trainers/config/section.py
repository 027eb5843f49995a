"""Base of the configuration classes: plain values, no unknown attributes, other spellings of fields."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from trainers.config.errors import ValidationError
from trainers.config.fields import fields_of
from trainers.config.plain import plain
from trainers.config.spellings import OTHER_SPELLINGS, canonical_section, other_value

ClassT = TypeVar("ClassT", bound=type)


class Section:
    """Base of the configuration classes.

    Values are copied as plain types when they are set, so that a configuration equals the one read back from its
    file and shares no list or dict with its caller.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        kind: Any = type(self)
        field = fields_of(kind).get(name)
        if field is None:
            raise AttributeError(self._why_not(name))
        settled = plain(value)
        if field.item is str and not field.is_list and type(settled) in (int, float):
            # As in a file, where 2024 and 64000 are numbers.
            settled = str(settled)
        object.__setattr__(self, name, settled)

    def _why_not(self, name: str) -> str:
        kind: Any = type(self)
        if hasattr(kind, name):
            return f"{kind.__name__}.{name} is another spelling and can only be read; set the field under its own name."
        close = difflib.get_close_matches(name, fields_of(kind), n=1, cutoff=0.5)
        return f"{kind.__name__} has no field {name!r}." + (f" Did you mean {close[0]!r}?" if close else "")


def accepts_other_spellings(section: str) -> Callable[[ClassT], ClassT]:
    """Return a class decorator that adds the other spellings of a section, as keywords and read-only attributes.

    Args:
        section: Name of the section.

    Returns:
        Decorator of a dataclass.
    """

    def decorate(configuration_class: ClassT) -> ClassT:
        changed: Any = configuration_class
        generated = changed.__init__
        names = [field.name for field in dataclasses.fields(configuration_class)]

        @functools.wraps(generated)
        def constructor(self: Any, *arguments: Any, **keywords: Any) -> None:
            by_position = dict(zip(names, arguments, strict=False))
            if len(arguments) > len(names) or by_position.keys() & keywords.keys():
                # Raises the TypeError that Python has for it.
                generated(self, *arguments, **keywords)
            content, problems = canonical_section(section, {**by_position, **keywords})
            if problems:
                raise ValidationError(problems, configuration_class.__name__)
            generated(self, **content)

        changed.__init__ = constructor
        for spelling, name in OTHER_SPELLINGS[section].items():
            setattr(configuration_class, spelling, _read_only(section, spelling, name))
        return configuration_class

    return decorate


def _read_only(section: str, spelling: str, name: str) -> property:
    def read(self: Any) -> Any:
        return other_value(section, spelling, getattr(self, name))

    return property(read, doc=f"Another spelling of `{name}`.")
