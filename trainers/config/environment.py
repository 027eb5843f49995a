r"""Interpolation in files: ``${oc.env:X}``, ``${oc.env:X,default}``, ``${X}``, ``${X:-default}``, ``${model.name}``.

A name without a dot means the environment unless it is a key of the configuration. ``\${`` is a literal ``${``; a
``$`` before anything else is literal as well. ``???`` stands for a value that is still to be given.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from trainers.config.errors import ConfigurationError, ValidationError
from trainers.config.fields import fields_of
from trainers.config.files import WrittenFloat, WrittenInteger
from trainers.config.inherited import INHERITED
from trainers.config.keys import canonical_key, canonical_names, field_at, unknown_key
from trainers.config.plain import plain
from trainers.config.schema import ExperimentConfig

_OPENING = re.compile(r"(\\*)\$\{")
_ENVIRONMENT = re.compile(r"oc\.env:\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*(?:,(?P<default>.*))?", re.DOTALL)
_SHELL = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*):-(?P<default>.*)", re.DOTALL)
_REFERENCE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TO_BE_GIVEN = "???"
_ESCAPED_TO_BE_GIVEN = re.compile(r"\\+\?\?\?")
_NOTHING = object()


class _Unresolvable(Exception):
    """What is wrong with one interpolation."""


def resolve(tree: dict[str, Any], source: str | None = None) -> dict[str, Any]:
    """Return a copy of a tree read from files in which every interpolation has its value.

    Args:
        tree: Under any spelling; not changed.
        source: What errors call it, such as the file.

    Returns:
        Plain values, with the keys of ``tree``. A string that is one interpolation takes the type of its value.

    Raises:
        ValidationError: A variable is not set and has no default, a reference leads nowhere or to itself, or a value
            is still to be given; all are listed, each with its key.

    Example:
        >>> resolve({"experiment_name": "first", "logging": {"log_file": "${experiment_name}.log"}})
        {'experiment_name': 'first', 'logging': {'log_file': 'first.log'}}
    """
    resolver = _Resolver(tree)
    try:
        resolved: dict[str, Any] = resolver.value(tree, (), ())
    except RecursionError:
        # YAML can express it, by an alias of what is around it.
        where = "the configuration" if source is None else source
        raise ConfigurationError(f"{where}: a dict or list contains itself; expected values that end.") from None
    if resolver.problems:
        raise ValidationError(resolver.problems, source)
    return resolved


def escaped(value: Any) -> Any:
    r"""Return a copy of a value that `resolve` turns back into the value.

    Args:
        value: Plain values.

    Returns:
        The same with every ``${`` and ``???`` escaped.

    Example:
        >>> print(escaped("echo ${HOME}"))
        echo \${HOME}
    """
    if isinstance(value, dict):
        return {key: escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [escaped(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if value == _TO_BE_GIVEN or _ESCAPED_TO_BE_GIVEN.fullmatch(value):
        return f"\\{value}"
    return _OPENING.sub(lambda found: f"{found[1] * 2}\\${{", value)


def interpolation_warnings(value: Any, key: str = "") -> list[str]:
    """Return a text for each string that looks like an interpolation nobody will resolve any more.

    Args:
        value: Content of a configuration after all files have been read.
        key: Its dotted key.

    Returns:
        One text a string, each beginning with the dotted key.

    Example:
        >>> interpolation_warnings({"seed": "${oc.env:SEED}"})
        ['seed: ${oc.env:SEED} is taken as it is; interpolations are resolved in files only']
    """
    if isinstance(value, dict):
        below = ((f"{key}.{name}" if key else str(name), entry) for name, entry in value.items())
        return [text for name, entry in below for text in interpolation_warnings(entry, name)]
    if isinstance(value, list):
        return [text for index, entry in enumerate(value) for text in interpolation_warnings(entry, f"{key}[{index}]")]
    if isinstance(value, str) and "${oc.env:" in value:
        return [f"{key}: {value} is taken as it is; interpolations are resolved in files only"]
    return []


class _Resolver:
    """Resolves one tree and collects what is wrong with it."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self._tree = tree
        # References may use other spellings than the tree; what is wrong with these is reported where it stands.
        self._canonical, _ = canonical_names(tree)

    def value(self, value: Any, key: tuple[str, ...], around: tuple[tuple[str, ...], ...]) -> Any:
        """Return a resolved copy of what stands at a key; ``around`` are the keys whose values refer to it."""
        if isinstance(value, dict):
            return {name: self.value(entry, (*key, str(name)), around) for name, entry in value.items()}
        if isinstance(value, list):
            return [self.value(entry, key, around) for entry in value]
        if isinstance(value, (WrittenFloat, WrittenInteger)):
            return value.text if _is_text(key) else plain(value)
        if not isinstance(value, str):
            return plain(value)
        try:
            return self._text(value, key, (*around, key))
        except _Unresolvable as error:
            self.problems.append(f"{'.'.join(key)}: {error}")
            return None

    def _text(self, text: str, key: tuple[str, ...], around: tuple[tuple[str, ...], ...]) -> Any:
        if text == _TO_BE_GIVEN:
            raise _Unresolvable("still to be given (???). Set it here or in an override")
        if _ESCAPED_TO_BE_GIVEN.fullmatch(text):
            return text[1:]
        pieces = []
        position = 0
        while opening := _OPENING.search(text, position):
            backslashes = len(opening[1])
            pieces.append(text[position : opening.start()] + "\\" * (backslashes // 2))
            position = opening.end()
            if backslashes % 2:
                pieces.append("${")
                continue
            end = _closing(text, position)
            found = self._interpolated(text[position:end], key, around)
            if opening.start() == 0 and backslashes == 0 and end + 1 == len(text):
                return found
            pieces.append(_inside_text(found, text[position:end]))
            position = end + 1
        return "".join([*pieces, text[position:]])

    def _interpolated(self, inner: str, key: tuple[str, ...], around: tuple[tuple[str, ...], ...]) -> Any:
        if match := _ENVIRONMENT.fullmatch(inner):
            value = os.environ.get(match["name"])
            return self._default(match, key, around) if value is None else value
        if match := _SHELL.fullmatch(inner):
            value = self._referred(match["name"], around)
            value = os.environ.get(match["name"]) if value is _NOTHING else value
            # As in the shell, which takes the default for an empty variable as well.
            return self._text(match["default"], key, around) if value in (None, "") else value
        if not _REFERENCE.fullmatch(inner):
            raise _Unresolvable(
                f"received ${{{inner}}}; expected a key, a variable or oc.env:VARIABLE in it. "
                r"Write \${ for a literal ${"
            )
        value = self._referred(inner, around)
        if value is not _NOTHING:
            return value
        if not _VARIABLE.fullmatch(inner):
            raise _Unresolvable(f"${{{inner}}} leads nowhere. {unknown_key(inner)}")
        return _variable(inner)

    def _default(self, match: re.Match[str], key: tuple[str, ...], around: tuple[tuple[str, ...], ...]) -> Any:
        if match["default"] is None:
            return _variable(match["name"])
        default = match["default"].strip()
        if default == "null":
            return None
        is_quoted = len(default) > 1 and default[0] == default[-1] and default[0] in "'\""
        return self._text(default[1:-1] if is_quoted else default, key, around)

    def _referred(self, dotted: str, around: tuple[tuple[str, ...], ...]) -> Any:
        """Resolved value of a key of the configuration; nothing if it is no such key."""
        found = _at(self._tree, dotted)
        if found is _NOTHING:
            try:
                dotted = canonical_key(dotted)
            except ConfigurationError:
                return _NOTHING
            found = _at(self._canonical, dotted)
            if found is _NOTHING and dotted in INHERITED:
                return self._referred(INHERITED[dotted], around)
            found = _default_of(dotted) if found is _NOTHING else found
        if found is _NOTHING:
            raise _Unresolvable(f"${{{dotted}}} refers to a key that is not set. Set {dotted}")
        place = tuple(dotted.split("."))
        if any(place == other[: len(place)] for other in around):
            chain = " -> ".join(".".join(other) for other in (*around, place))
            raise _Unresolvable(f"refers to itself: {chain}. Give one of them a value")
        known = len(self.problems)
        value = self.value(found, place, around)
        if len(self.problems) > known:
            problems = "; ".join(self.problems[known:])
            del self.problems[known:]
            raise _Unresolvable(f"refers to {problems}")
        return value


def _closing(text: str, start: int) -> int:
    depth = 1
    for found in re.finditer(r"(\\*)\$\{|\}", text[start:]):
        if found[0] == "}":
            depth -= 1
        elif len(found[1]) % 2 == 0:
            depth += 1
        if depth == 0:
            return start + found.start()
    raise _Unresolvable(rf"received {text!r}; expected a closing brace. Write \${{ for a literal ${{")


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise _Unresolvable(
            f"the environment variable {name} is not set. Set it, or write ${{oc.env:{name},default}} with a default"
        )
    return value


def _inside_text(value: Any, inner: str) -> str:
    if value is None or isinstance(value, (dict, list)):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise _Unresolvable(f"${{{inner}}} is {kind}; expected text or a number inside other text")
    return str(value)


def _at(tree: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return _NOTHING
        tree = tree[name]
    return tree


def _default_of(dotted: str) -> Any:
    """Default of a field of the schema; nothing for a section, a section that is None by default, and a free key."""
    *sections, name = dotted.split(".")
    owner: type = ExperimentConfig
    for section in sections:
        field = fields_of(owner).get(section)
        if field is None or not field.is_section or field.is_optional:
            return _NOTHING
        owner = field.item
    if fields_of(owner)[name].is_section:
        return _NOTHING
    default = owner.__dataclass_fields__[name]  # type: ignore[attr-defined]
    if default.default_factory is not dataclasses.MISSING:
        return default.default_factory()
    return _NOTHING if default.default is dataclasses.MISSING else default.default


def _is_text(key: tuple[str, ...]) -> bool:
    try:
        field, _ = field_at(".".join(key))
    except ConfigurationError:
        return False
    return field.item is str
