"""Dotted keys, merging, the search for files and the cache; nothing that was given is ever changed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

import trainers.config.manager as manager_module
from tests.small_disk import small_disk_or_skip
from tests.unit.trainers.test_config_schema import MINIMAL
from trainers.config import (
    ConfigurationError,
    ConfigurationManager,
    ValidationError,
    canonical_key,
    create_experiment_config,
    with_value,
)


@pytest.fixture
def manager(tmp_path: Path) -> ConfigurationManager:
    return ConfigurationManager(tmp_path)


@pytest.mark.parametrize(
    "key", ["seed", "model", "model.name", "custom_params.a.b.c", "model.custom_params.x", "data.augmentations.flip.p"]
)
def test_canonical_keys_stay(key: str) -> None:
    assert canonical_key(key) == key


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model.hiden_size", "Did you mean 'model.hidden_size'"),
        ("modl.hidden_size", "Did you mean 'model.hidden_size'"),
        ("hidden_size", "Did you mean 'model.hidden_size'"),
        ("optimiser", "Did you mean 'optimizer'"),
        ("optimizer.learning_rat", "Did you mean 'optimizer.learning_rate'"),
        ("slurm.gpu_per_node", "Did you mean 'slurm.gres'"),
        ("qqqqqqqq", "custom_params"),
        ("model.hidden_size.x", "model.hidden_size is a whole number and has no keys below it"),
        ("seed.x", "seed is a whole number or null and has no keys below it"),
        ("optimizer.betas.0", "optimizer.betas is a list of numbers"),
        ("", "a dotted key such as"),
        ("model.", "a dotted key such as"),
        (".seed", "a dotted key such as"),
        ("custom_params..x", "a dotted key such as"),
        (3, "a dotted key such as"),
    ],
)
def test_keys_that_are_not_in_the_schema(key: Any, text: str) -> None:
    for use in (canonical_key, lambda key: with_value(MINIMAL, key, 1)):
        with pytest.raises(ConfigurationError) as caught:
            use(key)
        assert str(caught.value).startswith(f"{key}: ")
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("base", "key", "value", "result"),
    [
        ({}, "seed", 1, {"seed": 1}),
        ({"model": {"type": "a"}}, "model.name", "b", {"model": {"name": "b"}}),
        ({"model": {"name": "a"}}, "model.type", "b", {"model": {"name": "b"}}),
        ({"slurm": None}, "slurm.partition", "p", {"slurm": {"partition": "p"}}),
        ({"slurm": {"gres": "gpu:1"}}, "slurm.gpus_per_node", 4, {"slurm": {"gres": "gpu:4"}}),
        ({}, "custom_params.a.b", 1, {"custom_params": {"a": {"b": 1}}}),
        ({"custom_params": {"a": None, "c": 2}}, "custom_params.a.b", 1, {"custom_params": {"a": {"b": 1}, "c": 2}}),
        ({"slurm": {"qos": "x"}}, "slurm", None, {"slurm": None}),
        # Into a section a dict is merged, a field it replaces.
        ({"model": {"name": "a", "dropout": 0}}, "model", {"type": "b"}, {"model": {"dropout": 0, "name": "b"}}),
        ({"data": {"preprocessing": {"a": 1}}}, "data.preprocessing", {"b": 1}, {"data": {"preprocessing": {"b": 1}}}),
        ({"custom_params": {"a": 1}}, "custom_params", {"b": 1}, {"custom_params": {"b": 1}}),
    ],
)
def test_with_value(base: dict[str, Any], key: str, value: Any, result: dict[str, Any]) -> None:
    before = copy.deepcopy((base, value))
    changed = with_value(base, key, value)
    assert changed == result
    assert (base, value) == before
    # Nothing is shared either.
    for content in changed.values():
        if isinstance(content, dict):
            content["mark"] = 1
    assert (base, value) == before


@pytest.mark.parametrize("base", [{"model": "mlp"}, {"model": [1]}])
def test_no_way_leads_through_a_value(base: dict[str, Any], manager: ConfigurationManager) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.name: received .*; expected a dict at model"):
        with_value(base, "model.name", "b")
    with pytest.raises(
        ConfigurationError, match=r"custom_params\.a\.b: received 1; expected a dict at custom_params\.a"
    ):
        manager.compose_configs({"custom_params": {"a": 1}}, parameter_overrides={"custom_params.a.b": 2})


def test_composition(manager: ConfigurationManager, tmp_path: Path) -> None:
    (manager.config_dir / "base.yaml").write_text(
        "experiment_name: base\nmodel: {type: mlp, custom_params: {a: {x: 1, y: [1, 2]}}}\ntraining: {}\n"
        "data:\n  dataset_name: ???\noptimizer: {name: adam}\nslurm: {gpus_per_node: 1, qos: low}\n"
        "logging: {log_file: '${experiment_name}.log'}\n"
    )
    (manager.config_dir / "override.json").write_text(
        '{"model": {"name": "cnn", "custom_params": {"a": {"y": [3]}}}, "data": {"dataset_name": "${experiment_name}"}}'
    )
    composed = manager.compose_configs(
        "base",
        ["override", {"slurm": {"gres": "gpu:2"}, "optimizer": {"type": "sgd"}}],
        {"experiment_name": "mine", "training.max_epochs": 3, "optimizer": {"lr": 0.5}, "scheduler.name": "step"},
    )
    assert composed == {
        "experiment_name": "mine",
        "model": {"name": "cnn", "custom_params": {"a": {"x": 1, "y": [3]}}},
        "training": {"epochs": 3},
        "data": {"dataset_name": "mine"},
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
        "slurm": {"gres": "gpu:2", "qos": "low"},
        "logging": {"log_file": "mine.log"},
        "scheduler": {"name": "step"},
    }
    assert manager.create_experiment_config(composed).training.epochs == 3
    assert manager.compose_configs(tmp_path / "configs" / "base.yaml", [{"slurm": None}, "override"])["slurm"] is None


def test_later_overrides_win(manager: ConfigurationManager) -> None:
    overrides = [{"seed": 2, "tags": ["a"]}, {"seed": 3, "tags": []}]
    assert manager.compose_configs({"seed": 1}, overrides) == {"seed": 3, "tags": []}
    assert manager.compose_configs({"seed": 1}, overrides, {"seed": 4})["seed"] == 4


def test_strings_in_dicts_are_literal(manager: ConfigurationManager) -> None:
    odd = {"description": "${x} ???", "created_by": "???"}
    assert manager.compose_configs(odd, [{"custom_params": odd}], {"custom_params.b": "\\${y}"}) == {
        **odd,
        "custom_params": {**odd, "b": "\\${y}"},
    }


def test_nothing_given_is_changed(manager: ConfigurationManager) -> None:
    (manager.config_dir / "base.yaml").write_text("custom_params: {a: {b: [1]}}")
    base = {"custom_params": {"a": {"b": [1]}}, "model": {"type": "x", "custom_params": {"deep": [1]}}}
    overrides = [{"custom_params": {"a": {"c": [2]}}}]
    parameters = {"custom_params.list": [3]}
    before = copy.deepcopy((base, overrides, parameters))
    for first in (base, "base"):
        for _ in range(2):
            composed = manager.compose_configs(first, overrides, parameters)
            assert composed["custom_params"] == {"a": {"b": [1], "c": [2]}, "list": [3]}
            composed["custom_params"]["a"]["b"].append("mine")
            composed["custom_params"]["a"]["c"].append("mine")
            composed["custom_params"]["list"].append("mine")
            assert (base, overrides, parameters) == before
    loaded = manager.load_config("base", validate=False)
    assert loaded == {"custom_params": {"a": {"b": [1]}}}
    loaded["custom_params"]["a"]["b"].append("mine")
    assert manager.load_config("base", validate=False) == {"custom_params": {"a": {"b": [1]}}}
    config = create_experiment_config({**MINIMAL, **base, "model": {"type": "x", "custom_params": {"deep": [1]}}})
    config.custom_params["a"]["b"].append("mine")
    assert (base, overrides, parameters) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (({}, "override.yaml"), "overrides: received 'override.yaml'; expected a list"),
        (({}, {"seed": 1}), "overrides: received .*; expected a list"),
        (({}, 3), "overrides: received 3; expected a list"),
        (({}, Path("override.yaml")), "overrides: received .*; expected a list"),
        (([],), "base_config: received list; expected a dict"),
        (({}, [3]), r"overrides\[0\]: received int; expected a dict"),
        (({}, [], [1]), "parameter_overrides: received list; expected a dict"),
        (({}, [], {"model.hiden_size": 1}), r"model\.hiden_size: no key .* 'model\.hidden_size'"),
        (({"model": {"name": "a", "type": "b"}},), r"model\.name: given twice"),
        (({"custom_params": {"a": float("nan")}},), r"custom_params\.a: received nan"),
    ],
)
def test_what_cannot_be_composed(manager: ConfigurationManager, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        manager.compose_configs(*arguments)


def test_a_project_that_can_only_be_read(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    with small_disk_or_skip(tmp_path / "project") as disk:
        disk.set_read_only(True)
        manager = ConfigurationManager(disk.folder)
        assert manager.compose_configs({"seed": 1}) == {"seed": 1}
        assert not manager.config_dir.exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "configs").touch()
    with pytest.raises(ConfigurationError, match="config_dir: the folder .*configs cannot be made"):
        ConfigurationManager(tmp_path)


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, work = tmp_path / "project", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    manager = ConfigurationManager(project)
    assert (manager.config_dir, manager.config_dir.is_dir()) == (project / "configs", True)

    places = [manager.config_dir / "run.v1.json", manager.config_dir / "run.v1.yml", manager.config_dir / "run.v1.yaml"]
    for number, place in enumerate(places):
        place.write_text(f'{{"seed": {number}}}')
        assert manager.load_config("run.v1", validate=False) == {"seed": number}
    for number, place in enumerate([manager.config_dir, project, work]):
        (place / "run.yaml").write_text(f"seed: {number}")
        assert manager.load_config("run.yaml", validate=False) == {"seed": number}
    assert manager.load_config(project / "run.yaml", validate=False) == {"seed": 1}
    (manager.config_dir / "sub").mkdir()
    (manager.config_dir / "sub" / "deep.yaml").write_text("seed: 9")
    assert manager.load_config("sub/deep", validate=False) == {"seed": 9}


def test_missing_files_list_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manager = ConfigurationManager(tmp_path / "project", tmp_path / "other")
    with pytest.raises(FileNotFoundError) as caught:
        manager.load_config("run")
    assert isinstance(caught.value, ConfigurationError)
    for place in ("run", "project/run", "other/run", "other/run.yaml", "other/run.yml", "other/run.json"):
        assert f"\n  - {tmp_path / place}" in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:
        manager.load_config(tmp_path / "run.yaml")
    assert str(caught.value).count("\n") == 1


def test_relative_folders_stay_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manager = ConfigurationManager(Path("project"))
    monkeypatch.chdir("/")
    assert manager.config_dir == tmp_path / "project" / "configs"


def test_the_cache_notices_a_changed_file(manager: ConfigurationManager, monkeypatch: pytest.MonkeyPatch) -> None:
    path = manager.config_dir / "run.yaml"
    reads = []
    genuine = manager_module.read_tree
    monkeypatch.setattr(manager_module, "read_tree", lambda *arguments: reads.append(1) or genuine(*arguments))
    path.write_text("custom_params: {a: '${VALUE:-1}'}")
    before = path.stat()
    for _ in range(2):
        assert manager.load_config("run", validate=False) == {"custom_params": {"a": "1"}}
    assert len(reads) == 1
    monkeypatch.setenv("VALUE", "2")
    assert manager.load_config("run", validate=False) == {"custom_params": {"a": "2"}}
    assert len(reads) == 1
    manager.load_config("run", validate=False, use_cache=False)
    assert len(reads) == 2

    # Same size, same time.
    path.write_text("custom_params: {b: '${VALUE:-1}'}")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert manager.load_config("run", validate=False) == {"custom_params": {"b": "2"}}


def test_both_spellings_in_one_file(manager: ConfigurationManager) -> None:
    (manager.config_dir / "run.yaml").write_text("model: {name: a, type: b}")
    with pytest.raises(ValidationError, match=r"(?s)run\.yaml.*model\.name: given twice"):
        manager.load_config("run")


def test_parameter_overrides_leave_the_cache_alone(manager: ConfigurationManager) -> None:
    (manager.config_dir / "base.yaml").write_text("custom_params: {a: {b: 1}}")
    composed = manager.compose_configs("base", parameter_overrides={"custom_params.a.b": 2})
    assert composed == {"custom_params": {"a": {"b": 2}}}
    assert manager.load_config("base", validate=False) == {"custom_params": {"a": {"b": 1}}}
