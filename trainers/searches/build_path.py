"""Where the function that builds experiments is: looked for without importing it, which may take long."""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from trainers.config.errors import ConfigurationError

_EXPECTED = "'module:function', importable from the project's folder"
# With these at its top level a module has names that are not written in it.
_OPEN = {"*", "__getattr__"}
# With these, wherever they are written, it may be given such names.
_DYNAMIC = {"__dict__", "__globals__", "exec", "f_globals", "globals", "locals", "modules", "setattr", "vars"}


def check_build_path(build: object, project_root: Path) -> None:
    """Refuse a function that is certainly not there.

    Args:
        build: ``"module:function"``.
        project_root: From where it is imported.

    Raises:
        ConfigurationError: It has another form; no such module is found; or its source has an error of syntax, or no
            such name.

    Example:
        >>> check_build_path("trainers.built:Built", Path("."))
    """
    if not isinstance(build, str) or not re.fullmatch(r"[\w.]+:\w+", build):
        raise ConfigurationError(f"build: received {build!r}; expected 'module:function'")
    module, _, function = build.partition(":")
    places: Sequence[str] = [str(project_root), *sys.path]
    spec: ModuleSpec | None = None
    for name in module.split("."):
        spec = PathFinder.find_spec(name, places)
        if spec is None:
            raise ConfigurationError(
                f"build: received {build!r}, but no {name!r} was found in {project_root} or on sys.path; "
                f"expected {_EXPECTED}"
            )
        places = list(spec.submodule_search_locations or ())
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return  # its names are known only once it is imported
    try:
        tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except OSError:
        return  # in an archive
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigurationError(f"build: {spec.origin}{line} cannot be parsed: {error}") from error
    names = set(_names(tree))
    if function in names or names & _OPEN or any(_may_bind(node, function) for node in ast.walk(tree)):
        return
    close = difflib.get_close_matches(function, names, 1)
    advice = f". Did you mean {module}:{close[0]}?" if close else ""
    raise ConfigurationError(
        f"build: received {build!r}, but {spec.origin} has no {function!r}; expected {_EXPECTED}{advice}"
    )


def _names(node: ast.AST) -> Iterator[str]:
    """Names that a module binds or asks for at its top level, in whatever statement."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
                continue
            case ast.alias():
                yield (child.asname or child.name).partition(".")[0]
            case ast.Name(id=name) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name
            case ast.MatchMapping(rest=str(name)):
                yield name
        yield from _names(child)


def _may_bind(node: ast.AST, name: str) -> bool:
    """Whether a node, of a function too, may bind a name at the module's top level."""
    match node:
        case ast.Global(names=names):
            return name in names
        case ast.Attribute(attr=attribute, ctx=context):
            return attribute in _DYNAMIC or (attribute == name and isinstance(context, ast.Store))
        case ast.Name(id=written) | ast.alias(name=written):
            return written in _DYNAMIC
    return False
