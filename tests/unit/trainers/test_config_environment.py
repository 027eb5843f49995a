"""Interpolations: environment and references anywhere inside strings, nothing unset left in place, the rest literal."""

from __future__ import annotations

from typing import Any

import pytest

from trainers.config import ConfigurationError, ValidationError
from trainers.config.environment import escaped, resolve

TREE: dict[str, Any] = {
    "experiment_name": "run",
    "model": {"type": "mlp", "hidden_size": 8, "custom_params": {"deep": {"er": [1, 2]}}},
    "slurm": {"gpus_per_node": 2},
    "description": None,
    "deterministic": True,
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("seed", "from the environment")
    monkeypatch.setenv("experiment_name", "from the environment")
    monkeypatch.setenv("REFERS", "${FOLDER}")
    for name in ("UNSET", "ALSO_UNSET"):
        monkeypatch.delenv(name, raising=False)


def resolved(text: Any) -> Any:
    return resolve({**TREE, "custom_params": {"it": text}})["custom_params"]["it"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${oc.env:FOLDER}", "/data"),
        ("a ${oc.env:FOLDER}/${oc.env:FOLDER} b", "a /data//data b"),
        ("${oc.env:UNSET,none}", "none"),
        ("${oc.env:UNSET, spaced }", "spaced"),
        ("${oc.env:UNSET,' quoted, '}", " quoted, "),
        ("${oc.env:UNSET,}", ""),
        ("${oc.env:UNSET,null}", None),
        ("${oc.env:EMPTY,default}", ""),
        ("${oc.env:UNSET,${oc.env:ALSO_UNSET,${FOLDER}/x}}", "/data/x"),
        ("${FOLDER}/x", "/data/x"),
        ("${UNSET:-/data/x}", "/data/x"),
        ("${EMPTY:-x}", "x"),
        ("${EMPTY}", ""),
        ("${UNSET:-}", ""),
        ("${UNSET:-${FOLDER}}", "/data"),
        ("${FOLDER:-x}", "/data"),
        ("${REFERS}", "${FOLDER}"),
        ("${experiment_name}", "run"),
        ("${experiment_name:-x}", "run"),
        ("${description:-x}", "x"),
        ("x-${experiment_name}-${model.hidden_size}", "x-run-8"),
        ("${model.hidden_size}", 8),
        ("${deterministic}", True),
        ("${description}", None),
        ("${model.custom_params.deep}", {"er": [1, 2]}),
        ("${model.type}", "mlp"),
        ("${model.name}", "mlp"),
        ("${slurm.gres}", "gpu:2"),
        ("${training.epochs}", 100),
        ("${training.max_epochs}", 100),
        ("${optimizer.betas}", [0.9, 0.999]),
        ("${data.batch_size}", 32),
        ("${seed}", None),
        ("${version}", "1.0"),
        (["${FOLDER}", {"x": "${FOLDER}"}], ["/data", {"x": "/data"}]),
    ],
)
def test_values(text: Any, value: Any) -> None:
    found = resolved(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["$FOLDER", "$(cmd)", "$", "a$", "$$", "{FOLDER}", "}", "$ {FOLDER}", "\\"])
def test_literals(text: str) -> None:
    assert resolved(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\${FOLDER}", "${FOLDER}"),
        (r"\\${FOLDER}", r"\/data"),
        (r"\\\${FOLDER}", r"\${FOLDER}"),
        (r"a\b\\c", r"a\b\\c"),
        (r"\???", "???"),
        ("a ???", "a ???"),
    ],
)
def test_escapes(text: str, value: str) -> None:
    assert resolved(text) == value
    assert resolved(escaped(text)) == text
    assert resolved(escaped(value)) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("${oc.env:UNSET}", "the environment variable UNSET is not set"),
        ("a ${UNSET} b", "the environment variable UNSET is not set"),
        ("${oc.env:UNSET,${ALSO_UNSET}}", "the environment variable ALSO_UNSET is not set"),
        ("${modle.name}", "${modle.name} leads nowhere. modle.name: no key of the schema. Did you mean 'model.name'?"),
        ("${data.dataset_name}", "${data.dataset_name} refers to a key that is not set"),
        ("${scheduler.name}", "${scheduler.name} refers to a key that is not set"),
        ("${custom_params.other}", "${custom_params.other} refers to a key that is not set"),
        ("x ${model}", "${model} is a dict"),
        ("x ${optimizer.betas}", "${optimizer.betas} is a list"),
        ("x ${description}", "${description} is null"),
        ("${FOLDER", "received '${FOLDER'; expected a closing brace"),
        ("${}", "received ${}; expected"),
        ("${#ARRAY[@]}", "received ${#ARRAY[@]}; expected"),
        ("${oc.decode:x}", "received ${oc.decode:x}; expected"),
        ("${custom_params.it}", "refers to itself: custom_params.it -> custom_params.it"),
        ("${custom_params}", "refers to itself"),
        ("???", "still to be given"),
    ],
)
def test_what_cannot_be_resolved(text: str, problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        resolved(text)
    assert [found[: len(problem) + 18] for found in caught.value.problems] == [f"custom_params.it: {problem}"]
    assert isinstance(caught.value, ConfigurationError)


def test_all_that_cannot_be_resolved_is_reported_with_its_key() -> None:
    tree = {"description": "${UNSET}", "tags": ["${ALSO_UNSET}"], "created_by": "by ${description}"}
    with pytest.raises(ValidationError) as caught:
        resolve(tree, "run.yaml")
    starts = ["description: the", "tags: the", "created_by: refers to description: the"]
    assert [text[: len(start)] for text, start in zip(caught.value.problems, starts, strict=True)] == starts
    assert "run.yaml" in str(caught.value)


def test_circles_are_found() -> None:
    with pytest.raises(ValidationError, match="refers to itself: description -> created_by -> description"):
        resolve({"description": "${created_by}", "created_by": "${description}"})


def test_chains_are_followed_and_the_tree_is_not_changed() -> None:
    tree = {
        "description": "${created_by}!",
        "created_by": "${custom_params.who}",
        "custom_params": {"who": "${FOLDER}"},
    }
    before = repr(tree)
    assert resolve(tree) == {"description": "/data!", "created_by": "/data", "custom_params": {"who": "/data"}}
    assert repr(tree) == before
