"""Writes down the public API: every name in a package's `__all__`, with its signature and public members.

`python -m tests.arch.public_api --write` renews `public_api.txt`; without `--write` it prints the API.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.arch.repository import SOURCE_FOLDERS

GOLDEN = Path(__file__).with_name("public_api.txt")
MODULES = [
    "mb_torch",
    "modelbatch",
    "modelbatch.core",
    "modelbatch.data",
    "modelbatch.optimizer",
    "torchmb",
    "trainers.config",
    "trainers.utils",
    "model_training_framework",
    "model_training_framework.config",
    "model_training_framework.trainer",
    "model_training_framework.utils",
]


def render(modules: list[str]) -> str:
    """The API of these modules as text; a name seen before is shown as an alias of its first place."""
    first_place: dict[int, str] = {}
    lines: list[str] = []
    for module_name in modules:
        module = importlib.import_module(module_name)
        lines.append(f"# {module_name}")
        for name in sorted(module.__all__):
            value, place = getattr(module, name), f"{module_name}.{name}"
            alias = first_place.setdefault(id(value), place)
            lines += _describe(place, value) if alias == place else [f"{place} = {alias}"]
        lines.append("")
    return "\n".join(lines)


def _describe(place: str, value: object) -> Iterator[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        yield f"class {place}{_signature(value)} <- {bases}"
        for name, member in _public_members(value):
            yield f"    {_describe_member(name, member)}"
    elif callable(value):
        yield f"def {place}{_signature(value)}"
    else:
        yield f"{place}: {type(value).__name__}"


def _public_members(cls: type) -> Iterator[tuple[str, object]]:
    """Members that a class of ours adds, inherited ones of ours included, those of torch not."""
    for name in sorted(dir(cls)):
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        if owner is not None and not name.startswith("_") and owner.__module__.split(".")[0] in _OURS:
            yield name, vars(owner)[name]


def _describe_member(name: str, member: object) -> str:
    if isinstance(member, property):
        return f"property {name} -> {_annotation(member.fget)}{' (settable)' if member.fset else ''}"
    if isinstance(member, classmethod | staticmethod):
        return f"{type(member).__name__} {name}{_signature(member.__func__)}"
    return f"def {name}{_signature(member)}" if callable(member) else f"{name}: {type(member).__name__}"


def _annotation(function: object) -> str:
    return str(getattr(function, "__annotations__", {}).get("return", "?"))


def _signature(value: object) -> str:
    """The signature, with the addresses in default values' names left out."""
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"


_OURS = {module.split(".")[0] for module in MODULES}

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in SOURCE_FOLDERS]
    if sys.argv[1:] == ["--write"]:
        GOLDEN.write_text(render(MODULES), encoding="utf-8")
    else:
        print(render(MODULES), end="")
