"""Configuration files: YAML and JSON in, YAML and JSON out, each file written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from trainers.config.errors import ConfigurationError, UnsupportedFormat

SUFFIXES = (".yaml", ".yml", ".json")
# Of texts that libyaml reads: a few hundred levels fit into the stack of any thread.
_LINE, _BRACKETS = 200, 100

_FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
# No octal numbers, no base 60, no underscores: 010, 24:00:00 and 1_000 stay text as written, and the fields that
# hold numbers convert it.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+")


class WrittenFloat(float):
    """A number that does not print as it was written in its file, such as 1.10; a text field takes what was written."""

    text: str


class WrittenInteger(int):
    """Likewise for whole numbers, such as 0x10."""

    text: str


def read_tree(path: Path, content: bytes) -> dict[str, Any]:
    """Return the content of a configuration file, nothing resolved or checked.

    Args:
        path: The file; its suffix says how to read it.
        content: What it holds.

    Returns:
        The dict at its top; empty for an empty file.

    Raises:
        UnsupportedFormat: The suffix is neither of YAML nor of JSON.
        ConfigurationError: The content is broken, is no dict or has a key twice; file and line are named.

    Example:
        >>> read_tree(Path("run.yaml"), b"slurm: {time_limit: 24:00:00}")
        {'slurm': {'time_limit': '24:00:00'}}
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UnsupportedFormat(f"{path}: received suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)}.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}, line {line}: no UTF-8 text: {error.reason}. Save it as UTF-8.") from error
    return _read_json(path, text) if path.suffix.lower() == ".json" else _read_yaml(path, text)


def written(tree: dict[str, Any], format: str) -> str:
    """Return the text of a configuration file.

    Args:
        tree: Plain values.
        format: "yaml", "yml" or "json".

    Returns:
        Text that `read_tree` reads back equal.

    Raises:
        UnsupportedFormat: The format is another one.

    Example:
        >>> print(written({"optimizer": {"eps": 1e-8}}, "yaml"), end="")
        optimizer:
          eps: 1.0e-08
    """
    if format == "json":
        return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if format in ("yaml", "yml"):
        # Lines of any length: folded text is harder to search, and changes when a word is added.
        return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    raise UnsupportedFormat(f"format: received {format!r}; expected yaml, yml or json.")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that, whenever the process dies, it holds its old content or the new one.

    Args:
        path: The file; folders above it are created, and of a link the file behind it is replaced.
        text: The content.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder, "new", "run.yaml"), "seed: 1")
        ...     Path(folder, "new", "run.yaml").read_text()
        'seed: 1'
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_json(path: Path, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        for key in tree:
            if sum(name == key for name, _ in pairs) > 1:
                raise _broken(path, _line_of_repeated(text, key), f"key {key!r} appears twice; expected once")
        return tree

    if not text.strip():
        return {}
    try:
        tree = json.loads(text, object_pairs_hook=unique, parse_float=_float, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise _broken(path, error.lineno, f"no valid JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise _broken(path, 1, f"no valid JSON: {error}") from error
    return _top(path, tree, 1)


def _line_of_repeated(text: str, key: str) -> int:
    """Line of the last place where the key is written: the one that would have won."""
    places = [found.start() for found in re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)]
    # A key written with escapes is not found in this way.
    return text.count("\n", 0, places[-1]) + 1 if places else 1


def _read_yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        node, tree = _parsed(_FastLoader if _is_plain(text) else _Loader, text)
    except Exception:
        # Whatever libyaml refuses, Python's parser refuses or explains.
        node, tree = _explained(path, text)
    return _top(path, tree, 1 if node is None else node.start_mark.line + 1)


def _is_plain(text: str) -> bool:
    """Whether libyaml, which is ten times as fast, reads the text as Python's parser does.

    It reads tabs and byte order marks otherwise, and overflows the stack where nesting is deep: blocks cannot nest
    deeper than a line is long, the rest not deeper than there are brackets.
    """
    longest = max(map(len, text.split("\n")))
    return longest <= _LINE and text.count("[") + text.count("{") <= _BRACKETS and not {"\t", "\ufeff"} & set(text)


def _explained(path: Path, text: str) -> tuple[yaml.Node | None, Any]:
    try:
        return _parsed(_Loader, text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise _broken(path, line, " ".join(filter(None, (error.context, error.problem)))) from error
    except yaml.reader.ReaderError as error:
        raise _broken(path, text.count("\n", 0, error.position) + 1, f"{error.reason}") from error
    except (RecursionError, ValueError) as error:
        raise _broken(path, 1, f"no valid YAML: {error}") from error


def _parsed(loader_class: Any, text: str) -> tuple[yaml.Node | None, Any]:
    loader = loader_class(text)
    node = loader.get_single_node()
    if node is None:
        return None, None
    _check_keys(node, set())
    return node, loader.construct_document(node)


def _check_keys(node: yaml.Node, seen: set[int]) -> None:
    """Raise if a mapping has a key twice; before merges are resolved, which may overwrite keys."""
    # What an alias stands for is one node in several places.
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _check_keys(entry, seen)
        return
    keys = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} appears twice; expected once", problem_mark=key.start_mark
                )
            keys.add(key.value)
        _check_keys(value, seen)


def _broken(path: Path, line: int, what: str) -> ConfigurationError:
    return ConfigurationError(f"{path}, line {line}: {what}.")


def _top(path: Path, tree: Any, line: int) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise _broken(path, line, f"received {type(tree).__name__} at the top; expected keys and their values")
    return tree


def _float(text: str) -> float:
    return _as_written(float(text.lower().replace(".inf", "inf").replace(".nan", "nan")), text, WrittenFloat)


def _integer(text: str) -> int:
    return _as_written(int(text, 16 if text.startswith("0x") else 10), text, WrittenInteger)


def _as_written(number: Any, text: str, kind: Callable[[Any], Any]) -> Any:
    if repr(number) == text:
        return number
    noted = kind(number)
    noted.text = text
    return noted


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types.
    """Numbers as above; no dates, which have no field."""


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Likewise, where PyYAML was built with libyaml."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what this module or a plain YAML 1.1 reader would take for anything but text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_OWN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "value")}
for _class in (_Loader, _FastLoader):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _float(loader.construct_scalar(node)))
    _class.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _integer(loader.construct_scalar(node)))
for _class in (_Loader, _FastLoader, _Dumper):
    for _name, _pattern in (("float", _FLOAT), ("int", _INTEGER)):
        _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, [*"-+.0123456789"])


def _represented_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Unquoted or in single quotes, these are line breaks and would come back as others or as blanks.
    breaks = "\x85\u2028\u2029"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if set(breaks) & set(text) else None)


_Dumper.add_representer(str, _represented_text)
