"""The framework: grid searches in every mode, what they write, and that nothing is written when something is wrong."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Generator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.arch.repository import ROOT
from tests.experiments import base_config, grid_of, make_project
from tests.small_disk import small_disk_or_skip
from trainers.config import (
    ConfigurationError,
    ConfigurationManager,
    ExecutionMode,
    NamingStrategy,
    ParameterGrid,
    ParameterGridSearch,
    ValidationError,
    create_experiment_config,
)
from trainers.config.results import GridSearchConfig, GridSearchResult
from trainers.searches import executors, framework
from trainers.searches.executors import Outcome, Plan
from trainers.searches.folder import GridFolder
from trainers.searches.framework import ModelTrainingFramework
from trainers.searches.local_executor import LocalExecutor

LOCAL, SLURM, DRY_RUN = ExecutionMode.LOCAL, ExecutionMode.SLURM, ExecutionMode.DRY_RUN
# Fails for seed 2, unless it may succeed.
FAILING = """
if "seed: 2" in pathlib.Path(options["--config"]).read_text() and not (folder.parent / "repaired").exists():
    sys.exit("no luck")
"""


BUILD = {"build": "scripts.train:build"}
# Cannot build seed 2, unless it may.
BUILDING = """
import sys
from pathlib import Path
import torch
from trainers.built import Built

def build(config):
    if config.seed == 2 and not Path("repaired").exists():
        raise ValueError("no luck")
    print("built", config.experiment_name)
    batches = [(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.ones(8, 2))]
    return Built(torch.nn.Linear(3, 2), torch.nn.functional.mse_loss, batches, batches)
"""


@pytest.fixture
def project(tmp_path: Path) -> ModelTrainingFramework:
    return ModelTrainingFramework(make_project(tmp_path / "project", FAILING))


def seeds(*values: int) -> ParameterGrid:
    return grid_of({"seed": values}, "seeds")


class SubmittingExecutor:
    """Stands for an executor of a batch system: submits every experiment but the second."""

    plans: list[Plan]

    def check(self, plan: Plan) -> None:
        pass

    def run(self, plan: Plan) -> Generator[Outcome]:
        self.plans.append(plan)
        for job in reversed(plan.jobs):
            yield Outcome(job, error="refused") if job.index == 1 else Outcome(job, job_id=f"12_{job.index}")

    def settled(self, folders: Any) -> set[Path]:
        return set(folders)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    plans: list[Plan] = []
    monkeypatch.setattr(SubmittingExecutor, "plans", plans, raising=False)
    module = types.ModuleType("slurm.executor")
    monkeypatch.setattr(module, "SlurmExecutor", SubmittingExecutor, raising=False)
    monkeypatch.setitem(sys.modules, "slurm", types.ModuleType("slurm"))
    monkeypatch.setitem(sys.modules, "slurm.executor", module)
    return plans


def set_clock(monkeypatch: pytest.MonkeyPatch, days: Iterator[int]) -> None:
    """Every look at the clock shows one of these days of a month, always at the same time of day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 1, next(days), 12, 5, 9)

    monkeypatch.setattr(framework, "datetime", Clock)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_dry_run(project: ModelTrainingFramework, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **keywords: pytest.fail("a process was started"))
    out = project.project_root / "out"
    grids = [seeds(1, 2), grid_of({"optimizer.lr": [0.5]}, "rates")]
    result = project.run_grid_search(grids, base_config(), execution_mode=DRY_RUN, output_dir=out)
    assert result.total_experiments == len(result.generated_experiments) == 3
    assert result.submitted_jobs == ["DRY_RUN"] * 3
    assert (result.failed_submissions, result.success_rate, result.output_directory) == ([], 1.0, out)
    assert result.execution_time > 0
    names = [config.experiment_name for config in result.generated_experiments]
    assert files_below(out) == sorted(
        [
            ".lock",
            "commands.txt",
            "execution_summary.json",
            "grid_config.json",
            *(f"{name}/config.yaml" for name in names),
        ]
    )
    manager = project.get_config_manager()
    for config in result.generated_experiments:
        loaded = manager.load_config(out / config.experiment_name / "config.yaml")
        assert create_experiment_config(loaded) == config
    again = ParameterGridSearch.load_grid_config(out / "grid_config.json")
    assert list(again.generate_experiments()) == result.generated_experiments
    assert again.base_config == base_config()
    assert result.grid_config.parameter_grids[0] is grids[0]
    assert result.grid_config.execution_mode is DRY_RUN
    summary = json.loads((out / "execution_summary.json").read_text())
    assert summary.items() >= {**result.get_summary(), "execution_mode": "dry_run", "failures": {}}.items()
    assert summary["experiments"] == names
    assert summary["grid_name"] == "seeds+rates"


def test_local(project: ModelTrainingFramework, caplog: pytest.LogCaptureFixture) -> None:
    out = project.project_root / "out"
    with caplog.at_level(logging.INFO):
        result = project.run_grid_search([seeds(1, 2, 3)], base_config(), execution_mode=LOCAL, output_dir=out)
    assert result.submitted_jobs == ["local-0", "local-2"]
    ((name, error),) = result.failed_submissions
    assert name == result.generated_experiments[1].experiment_name
    assert error.startswith("exit code 1")
    assert "no luck" in error
    assert result.success_rate == pytest.approx(2 / 3)
    assert json.loads((out / name / "job.json").read_text())["exit_code"] == 1
    assert json.loads((out / "execution_summary.json").read_text())["failures"] == {name: error}


@pytest.fixture
def building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelTrainingFramework:
    """A project with a function that builds experiments, given by a relative path."""
    monkeypatch.chdir(tmp_path)
    # The project's own folder is where its processes start, and is not on the path of this one.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "compat")]))
    Path("built_project").mkdir()
    Path("built_project", "experiments_for_tests.py").write_text(BUILDING)
    return ModelTrainingFramework("built_project")


def search_of_built(project: ModelTrainingFramework, mode: ExecutionMode, **extra: Any) -> GridSearchResult:
    return project.run_grid_search(
        [grid_of({"seed": [1, 2, 3]})],
        base_config(scheduler=None, training={"epochs": 2}),
        execution_mode=mode,
        output_dir=Path("out"),
        build="experiments_for_tests:build",
        **extra,
    )


def test_local_with_built_experiments(building: ModelTrainingFramework, tmp_path: Path) -> None:
    result = search_of_built(building, LOCAL)
    out = tmp_path / "out"
    assert result.output_directory == out
    assert result.submitted_jobs == ["local-0", "local-2"]
    names = [config.experiment_name for config in result.generated_experiments]
    (pack,) = (path.parent for path in out.glob("packs/*/pack.json"))
    error = f"it cannot be built: ValueError: no luck; output in {pack / 'local.err'}"
    assert result.failed_submissions == [(names[1], error)]
    for index, (name, state) in enumerate(zip(names, ["COMPLETED", "FAILED", "COMPLETED"], strict=True)):
        record = json.loads((out / name / "job.json").read_text())
        expected = {"executor": "local", "job_id": f"local-{index}", "state": state, "exit_code": 0}
        assert record.items() >= expected.items()
        assert record["command"] == [sys.executable, "-P", "-m", "trainers.packed", str(pack)]
        for made in ("metrics.csv", "checkpoints/latest.ckpt"):
            assert (out / name / made).exists() == (state == "COMPLETED")
    assert (pack / "local.out").read_text() == f"built {names[0]}\nbuilt {names[2]}\n"
    assert files_below(building.project_root) == ["experiments_for_tests.py"]


@pytest.mark.long
def test_rerun_of_built_experiments(building: ModelTrainingFramework, tmp_path: Path) -> None:
    names = [config.experiment_name for config in search_of_built(building, LOCAL).generated_experiments]
    before = {path: path.read_bytes() for path in tmp_path.glob("out/*/checkpoints/*")}
    Path("built_project", "repaired").touch()
    again = search_of_built(building, LOCAL, rerun_failed_only=True)
    assert [config.experiment_name for config in again.generated_experiments] == [names[1]]
    assert again.submitted_jobs == ["local-1"]
    assert (tmp_path / "out" / names[1] / "checkpoints" / "latest.ckpt").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_dry_run_with_built_experiments(building: ModelTrainingFramework, tmp_path: Path) -> None:
    result = search_of_built(building, DRY_RUN, pack_size=2, backend="torch")
    assert result.submitted_jobs == ["DRY_RUN"] * 3
    names = [config.experiment_name for config in result.generated_experiments]
    out = tmp_path / "out"
    commands = [shlex.split(line) for line in (out / "commands.txt").read_text().splitlines()]
    assert [command[:4] for command in commands] == [[sys.executable, "-P", "-m", "trainers.packed"]] * 2
    asked = [json.loads(Path(command[4], "pack.json").read_text()) for command in commands]
    assert [own["experiments"] for own in asked] == [names[:2], names[2:]]
    assert {(own["build"], own["backend"]) for own in asked} == {("experiments_for_tests:build", "torch")}
    assert not list(out.rglob("outcome.json"))
    for name in names:
        assert files_below(out / name) == ["config.yaml"]


def test_slurm(project: ModelTrainingFramework, submitted: list[Plan]) -> None:
    out = project.project_root / "out"
    result = project.run_grid_search([seeds(1, 2, 3)], base_config(), output_dir=out, max_concurrent_jobs=2)
    assert result.grid_config.execution_mode is SLURM
    assert result.submitted_jobs == ["12_0", "12_2"]
    assert result.failed_submissions == [(result.generated_experiments[1].experiment_name, "refused")]
    (plan,) = submitted
    assert plan.max_concurrent_jobs == result.grid_config.max_concurrent_jobs == 2
    assert [job.config for job in plan.jobs] == result.generated_experiments
    assert all(job.config_path.is_absolute() and job.config_path.is_file() for job in plan.jobs)
    assert (plan.project_root, plan.script_path) == (
        project.project_root,
        project.project_root / "scripts" / "train.py",
    )


def test_nothing_is_dropped(
    project: ModelTrainingFramework, submitted: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SubmittingExecutor.run
    monkeypatch.setattr(SubmittingExecutor, "run", lambda self, plan: (o for o in run(self, plan) if o.job.index))
    result = project.run_grid_search([seeds(1, 2, 3)], base_config())
    assert len(result.submitted_jobs) + len(result.failed_submissions) == result.total_experiments == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parameter_grids": [grid_of({"model.hiden_size": [1]})]}, "model.hiden_size"),
        ({"parameter_grids": [grid_of({"model.hidden_size": [8, -1]})]}, "model.hidden_size: received -1"),
        ({"parameter_grids": []}, "received 0 grids"),
        ({"base_config": None}, "received neither of base_config and base_config_path"),
        ({"base_config_path": "base.yaml"}, "received both of base_config and base_config_path"),
        ({"base_config": 3}, "base_config: received a int"),
        ({"base_config": "gone.yaml"}, "gone.yaml"),
        ({"execution_mode": "local"}, "execution_mode: received 'local'; expected one of ExecutionMode.LOCAL"),
        ({"max_concurrent_jobs": 0}, "max_concurrent_jobs: received 0"),
        ({"max_concurrent_jobs": True}, "max_concurrent_jobs: received True"),
        ({"script_path": "scripts/gone.py"}, "gone.py, which does not exist"),
        ({"rerun_failed_only": True}, "there is no grid_config.json"),
        ({"rerun_failed_only": True, "output_dir": None}, "rerun_failed_only: received no output_dir"),
        ({"execution_mode": ExecutionMode.SLURM}, "executor 'slurm' needs"),
        ({"build": "gone:build"}, "build: received 'gone:build', but no 'gone' was found in"),
        ({"build": "scripts.gone:build"}, "build: received 'scripts.gone:build', but no 'gone' was found"),
        ({"build": "scripts.train.deeper:build"}, "no 'deeper' was found"),
        ({"build": "scripts.train"}, "build: received 'scripts.train'; expected 'module:function'"),
        ({"build": "scripts/train.py:build"}, "expected 'module:function'"),
        ({"build": 3}, "build: received 3; expected 'module:function'"),
        ({**BUILD, "script_path": "scripts/train.py"}, "received both build and script_path"),
        ({**BUILD, "pack_size": 0}, "pack_size: received 0; expected a whole number >= 1"),
        ({**BUILD, "backend": 3}, "backend: received 3; expected the name of one, 'auto', or None"),
        ({"pack_size": 2}, "pack_size: received 2 without build"),
        ({"backend": "jax"}, "backend: received 'jax' without build"),
    ],
)
def test_nothing_is_written_when_something_is_wrong(
    project: ModelTrainingFramework, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.setitem(executors._EXECUTORS, "slurm", "no_such_package.executor:SlurmExecutor")
    before = sorted(project.project_root.rglob("*"))
    arguments = {
        "parameter_grids": [seeds(1)],
        "base_config": base_config(),
        "execution_mode": LOCAL,
        "output_dir": project.project_root / "out",
    }
    with pytest.raises(ConfigurationError) as raised:
        project.run_grid_search(**{**arguments, **changes})
    assert expected in str(raised.value)
    assert sorted(project.project_root.rglob("*")) == before


def test_all_invalid_experiments_are_reported(project: ModelTrainingFramework) -> None:
    with pytest.raises(ValidationError) as raised:
        project.run_grid_search([grid_of({"training.epochs": [0, 1], "model.dropout": [2.0]})], base_config())
    assert len(raised.value.problems) == 2


def test_base_from_a_file_is_resolved_for_each_experiment(project: ModelTrainingFramework) -> None:
    text = "\n".join(
        [
            "experiment_name: sweep",
            "model: {type: mlp}",
            "training: {learning_rate: 0.5}",
            "data: {dataset_name: digits}",
            "optimizer: {}",
            "checkpoint: {checkpoint_dir: 'runs/${experiment_name}'}",
            "description: 'seed ${seed} at ${training.learning_rate}'",
            "seed: 0",
        ]
    )
    (project.project_root / "configs" / "base.yaml").write_text(text)
    grid = grid_of({"seed": [1, 2], "training.learning_rate": [0.25], "tags": [["${literal}"]]})
    for arguments in ({"base_config_path": "base.yaml"}, {"base_config": Path("base")}):
        result = project.run_grid_search([grid], **arguments, execution_mode=DRY_RUN)  # type: ignore[arg-type]
        for config, seed in zip(result.generated_experiments, [1, 2], strict=True):
            assert config.checkpoint.checkpoint_dir == f"runs/{config.experiment_name}"
            assert config.description == f"seed {seed} at 0.25"
            assert config.optimizer.learning_rate == 0.25
            assert config.tags == ["${literal}"]
            assert result.output_directory is not None
            saved = result.output_directory / config.experiment_name / "config.yaml"
            assert create_experiment_config(project.get_config_manager().load_config(saved)) == config
        assert result.grid_config.base_config["checkpoint"] == {"checkpoint_dir": "runs/sweep"}


def test_default_output_folders_differ(project: ModelTrainingFramework, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, itertools.repeat(31))
    names = [
        project.run_grid_search([seeds(1)], base_config(), execution_mode=DRY_RUN).output_directory for _ in range(3)
    ]
    first = project.project_root / "experiments" / "grid_search_20260131_120509"
    assert names == [first, first.with_name(f"{first.name}_2"), first.with_name(f"{first.name}_3")]


def test_arguments_are_not_changed(project: ModelTrainingFramework) -> None:
    grid, base = grid_of({"model.custom_params.depth": [{"a": [1]}, {"a": [2]}]}), base_config()
    before = copy.deepcopy((grid, base))
    result = project.run_grid_search([grid], base, execution_mode=DRY_RUN)
    result.generated_experiments[0].model.custom_params["depth"]["a"].append(3)
    result.grid_config.base_config["model"].clear()
    assert (grid, base) == before


@pytest.mark.parametrize("strategy", list(NamingStrategy))
def test_rerun_of_what_failed(
    project: ModelTrainingFramework, strategy: NamingStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, itertools.count(1))

    def run(grid: ParameterGrid, **extra: Any) -> GridSearchResult:
        return project.run_grid_search([grid], base_config(), None, LOCAL, out, naming_strategy=strategy, **extra)

    out = project.project_root / "out"
    first = run(seeds(1, 2))
    failed = first.failed_submissions[0][0]
    assert [name for name, _ in run(seeds(1, 2), rerun_failed_only=True).failed_submissions] == [failed]
    (out / "repaired").touch()
    second = run(seeds(1, 2), rerun_failed_only=True)
    assert [config.experiment_name for config in second.generated_experiments] == [failed]
    assert (second.total_experiments, second.submitted_jobs, second.failed_submissions) == (1, ["local-1"], [])
    assert (out / failed / "local-1.err").read_text() == "no luck\n" * 2
    # What is missing runs as well, and then there is nothing to do.
    third = run(seeds(1, 2, 3), rerun_failed_only=True)
    assert [config.seed for config in third.generated_experiments] == [3]
    nothing = run(seeds(1, 2, 3), rerun_failed_only=True)
    assert (nothing.total_experiments, nothing.submitted_jobs, nothing.success_rate) == (0, [], 1.0)
    assert len([path for path in out.iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize("strategy", [NamingStrategy.HASH_BASED, NamingStrategy.TIMESTAMP_BASED])
def test_rerun_after_the_search_was_killed(
    project: ModelTrainingFramework, strategy: NamingStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, itertools.count(1))
    out, left = project.project_root / "out", project.project_root / "left"

    def run(folder: Path, **extra: Any) -> GridSearchResult:
        return project.run_grid_search(
            [seeds(1, 3)], base_config(), None, LOCAL, folder, naming_strategy=strategy, **extra
        )

    def killed(self: LocalExecutor, plan: Plan) -> Generator[Outcome]:
        shutil.copytree(out, left)
        yield from ()

    with monkeypatch.context() as patch:
        patch.setattr(LocalExecutor, "run", killed)
        run(out)
    names = {path.name for path in left.iterdir() if path.is_dir()}
    assert json.loads((left / "execution_summary.json").read_text())["failures"].keys() == names
    again = run(left, rerun_failed_only=True)
    assert {config.experiment_name for config in again.generated_experiments} == names
    assert len(again.submitted_jobs) == 2


def test_rerun_without_a_summary(project: ModelTrainingFramework) -> None:
    """Only names with a time need it."""
    out = project.project_root / "out"
    for strategy in (NamingStrategy.SEQUENTIAL, NamingStrategy.TIMESTAMP_BASED):
        options: dict[str, Any] = {"naming_strategy": strategy, "output_dir": out / strategy.value}
        project.run_grid_search([seeds(1, 2)], base_config(), execution_mode=LOCAL, **options)
        (out / strategy.value / "execution_summary.json").unlink()
        if strategy is NamingStrategy.TIMESTAMP_BASED:
            with pytest.raises(ConfigurationError, match=r"there is no execution_summary\.json"):
                project.run_grid_search([seeds(1)], base_config(), rerun_failed_only=True, **options)
        else:
            options["execution_mode"] = LOCAL
            again = project.run_grid_search([seeds(1, 2)], base_config(), rerun_failed_only=True, **options)
            assert [config.seed for config in again.generated_experiments] == [2]


def test_rerun_under_other_names_is_refused(project: ModelTrainingFramework) -> None:
    out = project.project_root / "out"
    project.run_grid_search([seeds(1)], base_config(), execution_mode=LOCAL, output_dir=out)
    with pytest.raises(ConfigurationError, match="naming_strategy: received 'sequential'; expected 'hash_based'"):
        project.run_grid_search(
            [seeds(1)],
            base_config(),
            execution_mode=LOCAL,
            output_dir=out,
            naming_strategy=NamingStrategy.SEQUENTIAL,
            rerun_failed_only=True,
        )


def test_rerun_asks_the_executor_that_ran_it(project: ModelTrainingFramework, submitted: list[Plan]) -> None:
    out = project.project_root / "out"
    result = project.run_grid_search([seeds(1, 3)], base_config(), execution_mode=DRY_RUN, output_dir=out)
    at_work = out / result.generated_experiments[0].experiment_name
    (at_work / "job.json").write_text('{"executor": "slurm", "job_ids": ["12"]}')
    again = project.run_grid_search(
        [seeds(1, 3)], base_config(), execution_mode=LOCAL, output_dir=out, rerun_failed_only=True
    )
    assert [config.seed for config in again.generated_experiments] == [3]


def test_results_of_another_configuration_are_not_overwritten(project: ModelTrainingFramework) -> None:
    out = project.project_root / "out"

    def run(mode: ExecutionMode, **changes: Any) -> GridSearchResult:
        return project.run_grid_search([seeds(1)], base_config(**changes), execution_mode=mode, output_dir=out)

    run(DRY_RUN, version="2.0")
    result = run(DRY_RUN)  # a dry run has no results
    run(LOCAL)
    assert run(LOCAL).submitted_jobs == ["local-0"]
    path = out / result.generated_experiments[0].experiment_name / "config.yaml"
    before = path.read_bytes()
    for mode in (LOCAL, DRY_RUN):
        with pytest.raises(ConfigurationError, match="holds the results of another configuration"):
            run(mode, version="2.0")
    assert path.read_bytes() == before


def test_grids_that_are_no_list(project: ModelTrainingFramework) -> None:
    for given, received in ((seeds(1), "a ParameterGrid"), ([{"seed": [1]}], r"\[{'seed': \[1\]}\]")):
        with pytest.raises(ConfigurationError, match=f"parameter_grids: received {received}; expected a list"):
            project.run_grid_search(given, base_config(), execution_mode=DRY_RUN)  # type: ignore[arg-type]


def test_an_output_folder_that_is_a_file(project: ModelTrainingFramework, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=f"output_dir: nothing can be written to {tmp_path / 'file'} .*exists"):
        project.run_grid_search([seeds(1)], base_config(), execution_mode=DRY_RUN, output_dir=tmp_path / "file")


def test_an_output_folder_that_can_only_be_read(project: ModelTrainingFramework, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with small_disk_or_skip(tmp_path / "disk") as disk:
        (disk.folder / "there").mkdir()
        disk.set_read_only(True)
        for name in ("there", "new"):
            with pytest.raises(ConfigurationError, match=f"output_dir: nothing .*{name} .*Read-only"):
                project.run_grid_search(
                    [seeds(1)], base_config(), execution_mode=DRY_RUN, output_dir=disk.folder / name
                )


def test_a_folder_in_use_is_refused(project: ModelTrainingFramework) -> None:
    out = project.project_root / "out"
    with GridFolder(out, project.get_config_manager()).lock() as descriptor:
        with pytest.raises(ConfigurationError, match="is in use by another grid search"):
            project.run_grid_search([seeds(1)], base_config(), execution_mode=DRY_RUN, output_dir=out)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    with pytest.raises(ConfigurationError, match="or by experiments that outlived theirs"):
        project.run_grid_search([seeds(1)], base_config(), execution_mode=DRY_RUN, output_dir=out)
    assert files_below(out) == [".lock"]
    child.communicate(b"\n")
    assert project.run_grid_search([seeds(1)], base_config(), execution_mode=DRY_RUN, output_dir=out).success_rate == 1


def test_configuration_manager_is_the_projects(project: ModelTrainingFramework, tmp_path: Path) -> None:
    manager = project.get_config_manager()
    assert isinstance(manager, ConfigurationManager)
    assert project.get_config_manager() is manager
    assert manager.config_dir == project.project_root / "configs"
    other = ModelTrainingFramework(str(project.project_root), config_dir=str(tmp_path / "elsewhere"))
    assert other.get_config_manager().config_dir == tmp_path / "elsewhere"


def test_slurm_launcher_is_found_by_name(project: ModelTrainingFramework, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(executors._LAUNCHERS, "slurm", "no_such_package.executor:create_launcher")
    with pytest.raises(ConfigurationError, match="No module named 'no_such_package'"):
        project.get_slurm_launcher()
    module = types.ModuleType("launchers_for_tests")
    monkeypatch.setattr(module, "create", lambda *given: given, raising=False)
    monkeypatch.setitem(sys.modules, "launchers_for_tests", module)
    monkeypatch.setitem(executors._LAUNCHERS, "slurm", "launchers_for_tests:create")
    template = project.project_root / "my_template.sh"
    template.touch()
    named = ModelTrainingFramework(project.project_root, slurm_template_path="my_template.sh")
    assert named.get_slurm_launcher() == (project.project_root, template)
    assert project.get_slurm_launcher() == (project.project_root, None)


def test_missing_project_and_template_are_errors_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="project_root: received .*gone"):
        ModelTrainingFramework(tmp_path / "gone")
    with pytest.raises(ConfigurationError, match=r"slurm_template_path: received gone\.txt"):
        ModelTrainingFramework(tmp_path, slurm_template_path="gone.txt")
    assert list(tmp_path.iterdir()) == []


def test_signatures_are_the_documented_ones() -> None:
    def parameters(function: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD]

    nothing = inspect.Parameter.empty
    assert parameters(ModelTrainingFramework) == [
        ("project_root", nothing),
        ("config_dir", None),
        ("slurm_template_path", None),
    ]
    assert parameters(ModelTrainingFramework.run_grid_search) == [
        ("parameter_grids", nothing),
        ("base_config", None),
        ("base_config_path", None),
        ("execution_mode", SLURM),
        ("output_dir", None),
        ("max_concurrent_jobs", None),
    ]
    assert parameters(ParameterGrid) == [("name", nothing), ("description", "")]
    assert parameters(ParameterGridSearch) == [("base_config", nothing)]


def test_results_and_their_defaults() -> None:
    config = GridSearchConfig("sweep")
    assert vars(config) == {
        "name": "sweep",
        "description": "",
        "base_config": {},
        "parameter_grids": [],
        "naming_strategy": NamingStrategy.HASH_BASED,
        "max_concurrent_jobs": None,
        "execution_mode": SLURM,
        "output_dir": None,
    }
    result = GridSearchResult(config, 4, submitted_jobs=["1"], failed_submissions=[("a", "b")], execution_time=2.5)
    assert result.get_summary() == {
        "grid_name": "sweep",
        "total_experiments": 4,
        "successful_submissions": 1,
        "failed_submissions": 1,
        "success_rate": 0.25,
        "execution_time_sec": 2.5,
        "output_directory": None,
    }
    assert GridSearchResult(config, 0).success_rate == 1.0
    assert [mode.value for mode in ExecutionMode] == ["local", "slurm", "dry_run"]
