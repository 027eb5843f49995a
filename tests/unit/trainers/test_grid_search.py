"""Several grids on one base: all experiments or an error, and JSON files."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from tests.experiments import base_config, grid_of
from trainers.config import (
    ConfigurationError,
    NamingStrategy,
    ParameterGrid,
    ParameterGridSearch,
    ValidationError,
    create_experiment_config,
)


def search_of(*grids: dict[str, Any], **settings: Any) -> ParameterGridSearch:
    search = ParameterGridSearch(base_config(), **settings)
    for index, parameters in enumerate(grids):
        search.add_grid(grid_of(parameters, f"grid {index}"))
    return search


def problems_of(search: ParameterGridSearch) -> list[str]:
    """What keeps a search from generating, which it must say in both ways."""
    with pytest.raises(ValidationError) as raised:
        search.generate_experiments()
    assert search.validate_grids() == raised.value.problems
    return raised.value.problems


def test_grids_follow_each_other_and_each_starts_from_the_base() -> None:
    search = search_of({"model.hidden_size": [8, 16]}, {"optimizer.lr": [0.5]}, {"model.custom_params.width.deep": [1]})
    experiments = list(search.generate_experiments())
    assert search.get_total_experiments() == len(experiments) == 4
    plain = create_experiment_config(base_config())
    assert [experiment.model.hidden_size for experiment in experiments] == [8, 16, 512, 512]
    assert [experiment.optimizer.learning_rate for experiment in experiments] == [1e-4, 1e-4, 0.5, 1e-4]
    assert experiments[3].model.custom_params == {"depth": 2, "width": {"deep": 1}}
    for experiment in experiments[:3]:
        assert experiment.model.custom_params == {"depth": 2}
    for experiment in experiments:
        for section in ("training", "data", "scheduler", "logging", "tags", "checkpoint"):
            assert getattr(experiment, section) == getattr(plain, section)
    assert search.validate_grids() == []


def test_base_is_copied_and_never_changed() -> None:
    given = base_config()
    search = ParameterGridSearch(given)
    search.create_grid("grid").add_parameter("model.custom_params.depth", [5, 6])
    before = copy.deepcopy(given)
    for experiment in search.generate_experiments():
        experiment.model.custom_params["depth"] = 99
    assert given == search.base_config == before
    search.base_config["model"]["custom_params"]["depth"] = 7
    assert given == before


def test_grids_are_the_same_objects() -> None:
    grid = grid_of({"seed": [1]})
    search = ParameterGridSearch(base_config())
    search.add_grid(grid)
    created = search.create_grid("second", "why")
    assert search.parameter_grids[0] is grid
    assert search.parameter_grids[1] is created
    assert (created.name, created.description) == ("second", "why")
    with pytest.raises(TypeError, match="expected a ParameterGrid"):
        search.add_grid({"seed": [1]})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="naming_strategy: received 'descriptive'"):
        search.set_naming_strategy("descriptive")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="received a list"):
        ParameterGridSearch([])  # type: ignore[arg-type]


def test_inheriting_field_follows_a_varied_source() -> None:
    search = search_of({"training.learning_rate": [0.5, 0.25]})
    assert [experiment.optimizer.learning_rate for experiment in search.generate_experiments()] == [0.5, 0.25]


def test_spelling_that_converts_its_value() -> None:
    (experiment,) = search_of({"preemption.max_checkpoint_sec": [120]}).generate_experiments()
    assert experiment.preemption.timeout_minutes == 2
    (other,) = search_of({"preemption.timeout_minutes": [2.0]}).generate_experiments()
    assert other.experiment_name == experiment.experiment_name


def test_section_as_a_parameter() -> None:
    search = search_of({"scheduler": [None, {"type": "cosine"}]})
    assert [e.scheduler and e.scheduler.name for e in search.generate_experiments()] == [None, "cosine"]


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([], ["parameter_grids: received 0 grids"]),
        ([{}, {}], ["parameter_grids: received 2 grids, none with a parameter"]),
        ([{"model.hiden_size": [1]}], ["model.hiden_size: no key of the schema. Did you mean 'model.hidden_size'?"]),
        ([{"seed": [1]}, {"wrong": [1], "also.wrong": [2]}], ["wrong: ", "also.wrong: "]),
        ([{"experiment_name": ["a"]}], ["experiment_name: cannot be a parameter"]),
        ([{"model.type": ["a"], "model.name": ["b"]}], ["model.name: means the same as model.type"]),
        ([{"model": [{"name": "a"}], "model.dropout": [0.1]}], ["model.dropout: one of it and model lies inside"]),
        ([{"model.dropout": [0.1], "model": [{"name": "a"}]}], ["model: one of it and model.dropout lies inside"]),
        ([{"seed": [1, 2, 1]}], ['parameter_grids: received the combination {"seed": 1} 2 times']),
        ([{"optimizer.lr": [0.1]}, {"optimizer.learning_rate": [0.1, 0.2]}], ["parameter_grids: received the combin"]),
        ([{"slurm.gpus_per_node": ["many"]}], ["slurm.gpus_per_node: received 'many'"]),
        ([{"seed": range(101)}, {"seed": range(200, 299)}], ["max_combinations: received grids of 200 combinations"]),
    ],
)
def test_what_is_wrong_with_grids_is_an_error(grids: list[dict[str, Any]], expected: list[str]) -> None:
    problems = problems_of(search_of(*grids, max_combinations=150))
    assert len(problems) == len(expected), problems
    for text, beginning in zip(problems, expected, strict=True):
        assert text.startswith(beginning)


def test_invalid_experiments_are_reported_together_and_by_name() -> None:
    search = search_of({"model.hidden_size": [-1, 8, 0], "training.epochs": [1, 0]})
    search.set_naming_strategy(NamingStrategy.SEQUENTIAL)
    problems = problems_of(search)
    assert len(problems) == 3
    assert all(text.startswith(("model.hidden_size: ", "training.epochs: ")) for text in problems)
    assert "2 experiments: run_0000, run_0001" in problems[0]
    assert "3 experiments: run_0001, run_0003, run_0005" in problems[1]


def test_a_wrong_type_is_reported_under_its_key() -> None:
    assert problems_of(search_of({"model.hidden_size": ["wide"]}))[0].startswith("model.hidden_size: received 'wide'")


@pytest.mark.parametrize("values", [[1, 1.0, "1", True], [0, False, "0", 0.0, None, ""]])
def test_equal_values_of_other_types_are_other_combinations(values: list[Any]) -> None:
    experiments = list(search_of({"custom_params.x": values}).generate_experiments())
    assert [experiment.custom_params["x"] for experiment in experiments] == values
    assert [type(experiment.custom_params["x"]) for experiment in experiments] == [type(value) for value in values]


def test_exclusions_drop_what_matches_all_their_pairs() -> None:
    excluded = [{"optimizer.learning_rate": 1, "seed": 2}, {"seed": 3}]
    search = search_of({"optimizer.lr": [1.0, 0.5], "seed": [1, 2, 3], "version": ["a", "b"]}, {"seed": [9]})
    search.exclude_combinations = excluded
    found = [(e.optimizer.learning_rate, e.seed, e.version) for e in search.generate_experiments()]
    kept = [(1, 1), (0.5, 1), (0.5, 2)]
    assert found == [*((rate, seed, text) for rate, seed in kept for text in "ab"), (1e-4, 9, "1.0")]
    assert search.get_total_experiments() == len(found) == 7


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        ({"seed": "1"}, "exclude_combinations[0]: received {'seed': '1'}, which matches no combination"),
        ({"model.dropout": 0.1}, "exclude_combinations[0]: received {'model.dropout': 0.1}, which matches no"),
        ({"sed": 1}, "sed: no key of the schema"),
        ({}, "exclude_combinations[0]: received no pair"),
    ],
)
def test_exclusion_without_effect_is_an_error(excluded: dict[str, Any], expected: str) -> None:
    (text,) = problems_of(search_of({"seed": [1, 2]}, exclude_combinations=[excluded]))
    assert text.startswith(expected)


def test_everything_excluded_is_an_error() -> None:
    (text,) = problems_of(search_of({"seed": [1]}, exclude_combinations=[{"seed": 1}]))
    assert "all combinations are excluded" in text


def test_huge_grids_are_counted_not_gone_through() -> None:
    search = search_of({f"custom_params.k{index}": range(10) for index in range(12)})
    search.exclude_combinations = [{"custom_params.k0": 0}]
    assert search.get_total_experiments() == 9 * 10**11
    assert problems_of(search)[0].startswith("max_combinations: received grids of 900000000000")


def test_announced_is_what_is_generated() -> None:
    search = search_of({"seed": range(4), "model.dropout": [0.0, 0.5]}, {"training.epochs": [1, 2]})
    assert search.get_total_experiments() == len(list(search.generate_experiments())) == 10


def test_base_without_a_name_takes_that_of_the_grid() -> None:
    base = base_config()
    del base["experiment_name"]
    search = ParameterGridSearch(base)
    search.add_grid(grid_of({"seed": [1]}, "learning rates"))
    search.set_naming_strategy(NamingStrategy.SEQUENTIAL)
    assert [experiment.experiment_name for experiment in search.generate_experiments()] == ["learning_rates_0000"]


@pytest.mark.parametrize(("base", "name"), [("my sweep/1", "my_sweep_1_0000"), (2026, "2026_0000")])
def test_base_name_is_brought_into_the_set_of_legal_names(base: object, name: str) -> None:
    search = ParameterGridSearch(base_config(experiment_name=base))
    search.add_grid(grid_of({"seed": [1]}))
    search.set_naming_strategy(NamingStrategy.SEQUENTIAL)
    assert [experiment.experiment_name for experiment in search.generate_experiments()] == [name]


@pytest.mark.parametrize("base", [None, True, ["run"]])
def test_base_name_that_is_no_text_is_an_error(base: object) -> None:
    search = ParameterGridSearch(base_config(experiment_name=base))
    search.add_grid(grid_of({"seed": [1]}))
    (text,) = problems_of(search)
    assert text.startswith("experiment_name: received")


def test_grid_file_round_trip(tmp_path: Path) -> None:
    search = search_of({"seed": [1, 2], "optimizer.betas": [[0.9, 0.99]]}, {"custom_params.x": [None, "é", 1.0]})
    search.name, search.description = "both", "what for"
    search.max_combinations, search.exclude_combinations = 77, [{"seed": 2}]
    search.base_config["data"]["preprocessing"] = {"odd": "${HOME}"}
    search.set_naming_strategy(NamingStrategy.DESCRIPTIVE)
    path = tmp_path / "new" / "grid.json"
    search.save_grid_config(path)
    loaded = ParameterGridSearch.load_grid_config(path)
    assert json.loads(path.read_text())["naming_strategy"] == "descriptive"
    for attribute in ("base_config", "parameter_grids", "naming_strategy", "name", "description"):
        assert getattr(loaded, attribute) == getattr(search, attribute)
    assert list(loaded.generate_experiments()) == list(search.generate_experiments())
    assert loaded.max_combinations == 77
    assert [item.name for item in path.parent.iterdir()] == ["grid.json"]


def test_grid_file_with_base_config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER_OF_RUNS", "runs")
    tree = base_config(logging={"log_file": "${oc.env:FOLDER_OF_RUNS}/${experiment_name}_${seed}.log"}, seed=0)
    (tmp_path / "base.json").write_text(json.dumps(tree))
    document = {"base_config_path": "base.json", "grids": [{"name": "g", "parameters": {"seed": [1, 2]}}]}
    (tmp_path / "grid.json").write_text(json.dumps({**document, "naming_strategy": "sequential"}))
    search = ParameterGridSearch.load_grid_config(tmp_path / "grid.json")
    files = [experiment.logging.log_file for experiment in search.generate_experiments()]
    assert files == ["runs/run_0000_1.log", "runs/run_0001_2.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json", "grid.json"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"grid": []}, "unknown key 'grid'. Did you mean 'grids'"),
        ({"base_config_path": "x.yaml"}, "received both of base_config and base_config_path"),
        ({"base_config": None}, "base_config: received None; expected an object"),
        ({"naming_strategy": "random"}, "naming_strategy: received 'random'; expected one of"),
        ({"grids": {}}, "grids: received {}; expected a list"),
        ({"grids": [{"parameters": {}}]}, r"grids[0]: the key 'name' is missing"),
        ({"grids": [{"name": "g", "parameters": {"seed": 3}}]}, "key 'seed': received 3"),
        ({"grids": [{"name": "g", "parameters": {"seed": []}}]}, "key 'seed': received no value"),
        ({"constraints": {"max_combination": 3}}, "constraints: received the unknown key 'max_combination'"),
        ({"constraints": {"max_combinations": True}}, "max_combinations: received True; expected a whole number"),
        ({"constraints": {"exclude_combinations": [1]}}, "exclude_combinations[0]: received 1"),
    ],
)
def test_wrong_grid_file_is_an_error(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "grid.json"
    document = {"base_config": base_config(), "grids": [{"name": "g", "parameters": {"seed": [1]}}]}
    path.write_text(json.dumps(document))
    assert ParameterGridSearch.load_grid_config(path).get_total_experiments() == 1
    path.write_text(json.dumps({**document, **change}))
    with pytest.raises(ConfigurationError) as raised:
        ParameterGridSearch.load_grid_config(path)
    assert expected in str(raised.value)
    assert "grid.json" in str(raised.value)


def test_broken_and_missing_grid_files(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    with pytest.raises(FileNotFoundError, match="grid.json"):
        ParameterGridSearch.load_grid_config(path)
    path.write_text('{"grids": [],\n"grids": []}')
    with pytest.raises(ConfigurationError, match="line 2"):
        ParameterGridSearch.load_grid_config(path)
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="'grids' is missing"):
        ParameterGridSearch.load_grid_config(path)


def test_unwritable_search_leaves_the_old_file(tmp_path: Path) -> None:
    search = search_of({"seed": [1]})
    search.save_grid_config(tmp_path / "grid.json")
    before = (tmp_path / "grid.json").read_bytes()
    search.base_config["custom_params"] = {"x": math.nan}
    with pytest.raises(ValidationError, match=r"custom_params\.x"):
        search.save_grid_config(tmp_path / "grid.json")
    with pytest.raises(ValueError, match=r"expected \.json"):
        search.save_grid_config(tmp_path / "grid.yaml")
    assert (tmp_path / "grid.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_default_limit_is_ten_thousand() -> None:
    search = search_of({"seed": range(10_001)})
    assert problems_of(search)[0].startswith("max_combinations: received grids of 10001 combinations; expected at most")


def test_unset_parameters_of_an_empty_grid_beside_another() -> None:
    search = search_of({"seed": [1]})
    search.add_grid(ParameterGrid("empty"))
    assert len(list(search.generate_experiments())) == search.get_total_experiments() == 1


def test_warnings_of_experiments_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        list(search_of({"optimizer.lr": [5.0]}).generate_experiments())
    assert "learning_rate" in caplog.text
