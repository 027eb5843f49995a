"""Everything that the API document of `model_training_framework` names is there, and can be called as documented."""

from __future__ import annotations
import __future__ as future

import collections.abc
import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.unit.trainers.api_document import CALLS, STUBS

# The package with the launcher comes later; its stubs are compared as soon as a name is taken out of here.
NOT_YET = {
    "model_training_framework.slurm.BatchSubmissionResult",
    "model_training_framework.slurm.GitManager",
    "model_training_framework.slurm.GitOperationError",
    "model_training_framework.slurm.JobStatus",
    "model_training_framework.slurm.JobSubmissionError",
    "model_training_framework.slurm.SLURMError",
    "model_training_framework.slurm.SLURMLauncher",
}
# Parameters that the document requires and that may be left out here, with the reason.
MAY_BE_LEFT_OUT = {
    "GenericTrainer.__init__: config": "all its settings have defaults",
}


def provided(module: str, name: str) -> Any:
    """The object under a documented name; None if it is not there."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None
    return getattr(loaded, name, None)


@functools.cache
def names() -> dict[str, Any]:
    """What annotations and defaults in stubs and in our own code stand for."""
    documented = {name: provided(module, name) for module, text in STUBS.items() for name in _classes_in(text)}
    return {
        **vars(typing),
        **vars(collections.abc),
        "DataLoader": DataLoader,
        "Enum": enum.Enum,
        "Path": pathlib.Path,
        "auto": enum.auto,
        "contextmanager": contextlib.contextmanager,
        "dataclass": dataclasses.dataclass,
        "field": dataclasses.field,
        "torch": torch,
        **{name: Absent if value is None else value for name, value in documented.items()},
    }


class Absent:
    """Stands in annotations for what is not there yet."""


def _classes_in(text: str) -> list[str]:
    return re.findall(r"^class (\w+)", text, flags=re.MULTILINE)


def stubs(text: str) -> dict[str, Any]:
    """The stubs in a text by name, annotations unresolved."""
    namespace = dict(names())
    code = compile(text, "the API document", "exec", flags=future.annotations.compiler_flag)
    exec(code, namespace)
    return {name: namespace[name] for name in _classes_in(text)}


def differences(stub: Any, ours: Any) -> Iterator[str]:
    """In what a class of ours is not as documented."""
    where = stub.__name__
    if not inspect.isclass(ours):
        yield f"{where} is no class"
        return
    if issubclass(stub, Exception):
        if not issubclass(ours, Exception):
            yield f"{where} is no exception"
    elif issubclass(stub, enum.Enum):
        members = ours.__members__ if issubclass(ours, enum.Enum) else {}
        yield from (f"{where}.{name} is missing" for name in stub.__members__ if name not in members)
    elif dataclasses.is_dataclass(stub):
        yield from _field_differences(stub, ours)
    else:
        for name, method in vars(stub).items():
            if inspect.isfunction(method):
                own = getattr(ours, name, None)
                place = f"{where}.{name}"
                yield from signature_differences(place, method, own) if own else [f"{place} is missing"]


def _field_differences(stub: Any, ours: Any) -> Iterator[str]:
    where = stub.__name__
    if not dataclasses.is_dataclass(ours):
        yield f"{where} is no dataclass"
        return
    expected, found = ({one.name: one for one in dataclasses.fields(cls)} for cls in (stub, ours))
    if [*found] != [*expected]:
        yield f"{where} has the fields {[*found]}; documented: {[*expected]}"
        return
    for name, one in expected.items():
        own = found[name]
        if (own.default, own.default_factory) != (one.default, one.default_factory):
            yield f"{where}.{name} has another default"
        if not (own.init and not own.kw_only):
            yield f"{where}.{name} cannot be given by position"
        if resolved(own.type, ours) != resolved(one.type, stub):
            yield f"{where}.{name} is {own.type}; documented: {one.type}"


def signature_differences(place: str, stub: Callable[..., Any], ours: Callable[..., Any]) -> Iterator[str]:
    """In what a function of ours cannot be called as documented, or takes more than keywords that have defaults."""
    expected, found = (inspect.signature(function) for function in (stub, ours))
    own = [*found.parameters.values()]
    for index, parameter in enumerate(expected.parameters.values()):
        here = f"{place}: {parameter.name}"
        if index >= len(own) or own[index].name != parameter.name or own[index].kind != parameter.kind:
            yield f"{here} is not parameter {index} of {found}"
            return
        if own[index].default != parameter.default and here not in MAY_BE_LEFT_OUT:
            yield f"{here} has the default {own[index].default}; documented: {parameter.default}"
        taken, documented = (resolved(one.annotation, f) for one, f in ((own[index], ours), (parameter, stub)))
        if index and not accepts(taken, documented):
            yield f"{here} takes {taken}; documented: {documented}"
    for extra in own[len(expected.parameters) :]:
        if extra.kind is not inspect.Parameter.KEYWORD_ONLY or extra.default is inspect.Parameter.empty:
            yield f"{place}: {extra.name} is not documented, and no keyword with a default"
    returned, documented = (resolved(one.return_annotation, f) for one, f in ((found, ours), (expected, stub)))
    is_said = documented is not inspect.Parameter.empty and Absent not in _kinds(documented)
    if is_said and (returned is Any or not accepts(documented, returned)):
        yield f"{place} returns {returned}; documented: {documented}"


def resolved(annotation: Any, owner: Any) -> Any:
    """What an annotation in the text of a function or class stands for."""
    if not isinstance(annotation, str):
        return annotation
    module = importlib.import_module(owner.__module__) if owner.__module__ != "builtins" else typing
    return eval(annotation, {**names(), **vars(module)}, dict(names()))


def accepts(taken: Any, given: Any) -> bool:
    """Whether everything of one type is of another: unions member by member, generic classes without arguments."""
    if taken is Any or given is inspect.Parameter.empty or Absent in _kinds(given):
        return True
    return all(kind is Any or issubclass(kind, _kinds(taken)) for kind in _kinds(given))


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(kind for member in typing.get_args(annotation) for kind in _kinds(member))
    return (type(None) if annotation is None else typing.get_origin(annotation) or annotation,)


ENTRIES = [(module, name) for module, text in STUBS.items() for name in _classes_in(text)]


def test_what_is_missing_is_exactly_what_is_said_to_be() -> None:
    missing = {f"{module}.{name}" for module, name in ENTRIES if provided(module, name) is None}
    assert missing == NOT_YET


@pytest.mark.parametrize(("module", "name"), [entry for entry in ENTRIES if ".".join(entry) not in NOT_YET])
def test_it_is_as_documented(module: str, name: str) -> None:
    assert name in importlib.import_module(module).__all__
    assert [*differences(stubs(STUBS[module])[name], provided(module, name))] == []


def test_parameters_that_may_be_left_out_are_optional() -> None:
    """The list of exceptions has nothing in it that is no exception."""
    found = set()
    for module, text in STUBS.items():
        for name, stub in stubs(text).items():
            ours = provided(module, name)
            for method in vars(stub) if ours is not None else ():
                for parameter in MAY_BE_LEFT_OUT:
                    if parameter.startswith(f"{name}.{method}: "):
                        own = inspect.signature(getattr(ours, method)).parameters[parameter.partition(": ")[2]]
                        found |= {parameter} if own.default is not inspect.Parameter.empty else set()
    assert found == MAY_BE_LEFT_OUT.keys()


@pytest.mark.parametrize("name", CALLS)
def test_documented_calls(name: str) -> None:
    function = provided("model_training_framework.utils", name)
    arguments, keywords = CALLS[name]
    inspect.signature(function).bind(*arguments, **keywords)


def test_the_documented_use_of_results() -> None:
    from model_training_framework.utils import Error, Result, Success

    def some_operation(success: bool) -> Result[str, str]:
        return Success("operation completed") if success else Error("operation failed")

    result = some_operation(True)
    assert isinstance(result, Success)
    assert result.value == "operation completed"
    failed = some_operation(False)
    assert not isinstance(failed, Success)
    assert failed.error == "operation failed"


def in_one_text(changes: Mapping[str, str]) -> list[str]:
    """What is found where our class is its stub, altered."""
    text = """
class Thing:
    def act(self, first: int | str, second: Path | None = None) -> bool: ...
    def rest(self) -> None: ...
@dataclass
class Record:
    one: int
    two: list[str] = field(default_factory=list)
class Phase(Enum):
    START = auto()
    END = auto()
class Failure(Exception): ...
"""
    altered = text
    for before, after in changes.items():
        assert before in altered
        altered = altered.replace(before, after)
    found, expected = stubs(altered), stubs(text)
    return [line for name, stub in expected.items() for line in differences(stub, found.get(name))]


def test_what_is_the_same_has_no_differences() -> None:
    assert in_one_text({}) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("second: Path | None = None", "other: Path | None = None"),
        ("second: Path | None = None", "second: Path | None = 1"),
        ("second: Path | None = None", "second: Path | None"),
        ("second: Path | None = None", "second: Path = None"),
        ("second: Path | None = None", "*, second: Path | None = None"),
        ("second: Path | None = None", "second: Path | None = None, third: int = 0"),
        ("second: Path | None = None", "second: Path | None = None, *, third: int"),
        ("second: Path | None = None", "second: Path | None = None, *third: int"),
        ("first: int | str, second: Path | None = None", "second: Path | None = None, first: int | str = 0"),
        ("first: int | str", "first: int"),
        ("-> bool", "-> str"),
        ("-> bool", "-> bool | None"),
        ("-> bool", "-> Any"),
        ("def rest", "def stay"),
        ("one: int\n", "one: float\n"),
        ("one: int\n", "one: int = 0\n"),
        ("default_factory=list", "default_factory=tuple"),
        ("    one: int\n", ""),
        ("    one: int\n", "    one: int\n    more: int = field(kw_only=True)\n"),
        ("@dataclass", ""),
        ("END = auto", "STOP = auto"),
        ("class Phase(Enum)", "class Phase"),
        ("class Failure(Exception)", "class Failure"),
        ("class Thing", "class Something"),
    ],
)
def test_what_is_not_as_documented_is_found(before: str, after: str) -> None:
    assert len(in_one_text({before: after})) >= 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("second: Path | None = None", "second: Path | None = None, *, third: int = 0"),
        ("second: Path | None = None", "second: Any = None"),
        ("first: int | str", "first: int | str | Path"),
        ("def rest", "def more(self) -> None: ...\n    def rest"),
        ("END = auto()", "END = auto()\n    LATER = auto()"),
        ("class Failure(Exception)", "class Failure(ValueError)"),
    ],
)
def test_what_does_more_is_as_documented(before: str, after: str) -> None:
    assert in_one_text({before: after}) == []
