"""What a user sees of a search when it is done: the table, the best experiment, the picture, and results.csv."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.experiments import base_config, grid_of, make_project
from trainers.config import ConfigurationError, ExecutionMode, ParameterGrid, create_experiment_config
from trainers.config.result_table import FoundExperiment, as_csv
from trainers.config.results import GridSearchConfig, GridSearchResult
from trainers.searches import results_file
from trainers.searches.build_path import check_build_path
from trainers.searches.executors import Job, Outcome
from trainers.searches.framework import ModelTrainingFramework
from trainers.searches.results_file import ResultsFile

# Writes two epochs; what it calls a loss follows from the seed. Fails for seed 2, unless it may succeed.
WRITING = """
import re
seed = int(re.search(r"^seed: (\\d+)", open(options["--config"]).read(), re.M)[1])
rows = [f"1,0,val_loss,{0.1 * seed}", "1,0,step_val_loss,9", f"2,1,val_loss,{1 / seed}", "2,1,seed,7"]
(folder / "metrics.csv").write_text("".join(f"{row}\\n" for row in ["step,epoch,name,value", *rows]))
if seed == 2 and not (folder.parent / "repaired").exists():
    sys.exit("no luck")
"""


@pytest.fixture
def project(tmp_path: Path) -> ModelTrainingFramework:
    return ModelTrainingFramework(make_project(tmp_path / "project", WRITING))


def run(project: ModelTrainingFramework, *grids: ParameterGrid, **options: Any) -> GridSearchResult:
    options = {"execution_mode": ExecutionMode.LOCAL, "output_dir": project.project_root / "out", **options}
    return project.run_grid_search(list(grids) or [grid_of({"seed": [1, 2, 4]})], base_config(), **options)


def written(project: ModelTrainingFramework) -> list[dict[str, str]]:
    with (project.project_root / "out" / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def experiment(folder: Path, name: str, text: str | None = None, **own: Any) -> FoundExperiment:
    (folder / name).mkdir()
    if text is not None:
        (folder / name / "metrics.csv").write_text(text)
    return FoundExperiment(name, folder / name, **own)


def values(*rows: tuple[int, str, float]) -> str:
    return "step,epoch,name,value\n" + "".join(f"0,{epoch},{name},{value!r}\n" for epoch, name, value in rows)


def result_of(*experiments: FoundExperiment) -> GridSearchResult:
    return GridSearchResult(GridSearchConfig("grid"), len(experiments), experiments=list(experiments))


def test_table_of_a_search(project: ModelTrainingFramework) -> None:
    result = run(project)
    names = [config.experiment_name for config in result.generated_experiments]
    first, second, third = result.table()
    assert first == {
        "name": names[0],
        "state": "COMPLETED",
        "epochs": 2,
        "seed": 1,
        "val_loss": 1.0,
        "metrics.seed": 7.0,
    }
    assert (second["state"], second["val_loss"]) == ("FAILED", 0.5)
    assert second["error"] == dict(result.failed_submissions)[names[1]]
    assert result.best() == third
    assert [row["best_epoch"] for row in result.table("val_loss")] == [0, 0, 1]
    assert result.best(any_epoch=True)["name"] == names[0]
    assert [row["val_loss"] for row in result.table("val_loss", "max")] == [1.0, 0.5, 0.4]
    assert result.best(mode="max")["name"] == names[0]
    assert written(project) == [
        {key: str(row.get(key, "")) for key in [*first, "error"]} for row in (first, second, third)
    ]


def test_a_rerun_has_the_whole_table(project: ModelTrainingFramework) -> None:
    before = run(project).table()
    (project.project_root / "out" / "repaired").touch()
    again = run(project, rerun_failed_only=True)
    assert again.total_experiments == 1
    del before[1]["error"]
    assert again.table() == [before[0], {**before[1], "state": "COMPLETED"}, before[2]]
    assert [row["state"] for row in written(project)] == ["COMPLETED"] * 3
    nothing = run(project, rerun_failed_only=True)
    assert (nothing.total_experiments, nothing.table()) == (0, again.table())


def test_a_dry_run_has_no_results(project: ModelTrainingFramework) -> None:
    result = run(project, execution_mode=ExecutionMode.DRY_RUN)
    assert {row["state"] for row in result.table()} == {"DRY_RUN"}
    assert not (project.project_root / "out" / "results.csv").exists()


def test_columns_are_those_of_all_grids_as_they_spell_them(project: ModelTrainingFramework) -> None:
    grids = [
        grid_of({"seed": [1], "optimizer.lr": [0.5]}),
        grid_of({"seed": [3], "optimizer.learning_rate": [0.25], "model.custom_params.depth": [[1, 2]]}),
    ]
    rows = run(project, *grids).table()
    keys = ("seed", "optimizer.lr", "model.custom_params.depth")
    assert [tuple(row[key] for key in keys) for row in rows] == [(1, 0.5, 2), (3, 0.25, [1, 2])]
    assert [row["model.custom_params.depth"] for row in written(project)] == ["2", "[1, 2]"]


def test_the_file_is_up_to_date_while_experiments_end(
    project: ModelTrainingFramework, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "_SECONDS_BETWEEN", 0.0)
    script = project.project_root / "scripts" / "train.py"
    script.write_text(
        script.read_text() + "\nimport shutil\nif seed == 4: shutil.copy(folder.parent / 'results.csv', folder)\n"
    )
    last = run(project).generated_experiments[2].experiment_name
    with (project.project_root / "out" / last / "results.csv").open(newline="") as stream:
        states = [row["state"] for row in csv.DictReader(stream)]
    assert states[:2] == ["COMPLETED", "FAILED"]
    assert states[2] in ("NOT RUN", "RUNNING")


def test_states_at_the_end_are_those_of_the_end(tmp_path: Path) -> None:
    ended, stopped, interrupted, lost = jobs = [
        Job(index, name, create_experiment_config(base_config(experiment_name=name)), tmp_path / name)
        for index, name in enumerate(("ended", "stopped", "interrupted", "lost"))
    ]

    def record(job: Job, state: str) -> None:
        job.folder.mkdir(exist_ok=True)
        job.record_path.write_text(json.dumps({"executor": "local", "state": state}))

    for job in jobs:
        record(job, "RUNNING")
    results = ResultsFile(tmp_path / "results.csv", jobs, [])
    record(ended, "COMPLETED")
    results.note(Outcome(ended, job_id="local-0"))
    with (tmp_path / "results.csv").open(newline="") as stream:
        assert [row["state"] for row in csv.DictReader(stream)] == ["COMPLETED", *["RUNNING"] * 3]
    record(stopped, "CANCELLED")
    record(interrupted, "INTERRUPTED")
    results.note(Outcome(interrupted, error="interrupted"))
    # Its end could not be recorded.
    results.note(Outcome(lost, error="no space"))
    expected = ["COMPLETED", "CANCELLED", "INTERRUPTED", "FAILED"]
    assert [one.state for one in results.end()] == expected
    with (tmp_path / "results.csv").open(newline="") as stream:
        assert [row["state"] for row in csv.DictReader(stream)] == expected


def test_a_file_that_cannot_be_written_ends_no_search(
    project: ModelTrainingFramework, caplog: pytest.LogCaptureFixture
) -> None:
    (project.project_root / "out" / "results.csv").mkdir(parents=True)
    assert run(project, grid_of({"seed": [1]})).submitted_jobs == ["local-0"]
    assert "results.csv cannot be written" in caplog.text


def test_odd_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = values((0, "val_loss", 0.5), (1, "val_loss", 0.25))
    # The last one was to be 1.2e-05.
    for torn in ("0,2,val_lo", "0,2,val_loss,1.2"):
        killed = experiment(tmp_path, f"killed{len(torn)}", whole + torn)
        assert killed.row() == {"name": killed.name, "state": "COMPLETED", "epochs": 2, "val_loss": 0.25}
    assert experiment(tmp_path, "damaged", whole + "0,?,other,1.0\n").metrics() == killed.metrics()
    own = experiment(tmp_path, "own", "epoch,loss\n0,0.5\n")
    assert own.metrics() == {}
    assert "own/metrics.csv: received the columns ['epoch', 'loss']; expected ['step', 'epoch', " in caplog.text
    assert experiment(tmp_path, "empty", "").metrics() == experiment(tmp_path, "none").metrics() == {}
    named = experiment(tmp_path, "named")
    (named.folder / "named").mkdir()
    (named.folder / "named" / "metrics.csv").write_text(whole)
    assert named.metrics() == killed.metrics()
    (tmp_path / "file").touch()
    assert FoundExperiment("file", tmp_path / "file").metrics() == {}


def test_metrics_that_are_called_as_values_of_steps_are(tmp_path: Path) -> None:
    rows = [(0, "step_loss", 3.0), (0, "step_step_rate", 9.0), (0, "step_loss", 2.0)]
    assert experiment(tmp_path, "first epoch", values(*rows)).metrics() == {}
    ended = [(0, "loss", 2.5), (0, "step_rate", 8.0), (0, "step_time", 0.5), (0, "val_step_time", 0.5)]
    metrics = experiment(tmp_path, "second epoch", values(*rows, *ended, (1, "step_loss", 1.0))).metrics()
    assert metrics == {name: {0: value} for _, name, value in ended}


def test_the_best_row_has_the_values_by_which_it_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = result_of(experiment(tmp_path, "at work", values((0, "val_loss", 0.5))))
    read = FoundExperiment.metrics

    def read_and_go_on(one: FoundExperiment) -> dict[str, dict[int, float]]:
        metrics = read(one)
        (one.folder / "metrics.csv").write_text(values((0, "val_loss", 0.5), (1, "val_loss", 7.0)))
        return metrics

    monkeypatch.setattr(FoundExperiment, "metrics", read_and_go_on)
    assert result.best()["val_loss"] == 0.5


def test_the_best_is_complete_and_finite(tmp_path: Path) -> None:
    nan = float("nan")
    result = result_of(
        experiment(tmp_path, "diverged", values((0, "val_loss", 0.125), (1, "val_loss", nan))),
        experiment(tmp_path, "failed", values((0, "val_loss", 0.0)), state="FAILED", error="why"),
        experiment(tmp_path, "good", values((0, "val_loss", 0.5), (1, "val_loss", 0.75))),
        experiment(tmp_path, "equal", values((0, "val_loss", 0.75))),
    )
    assert result.best()["name"] == "good"
    assert result.best(any_epoch=True)["name"] == "diverged"
    with pytest.raises(ConfigurationError, match=r"metric: received 'val_los'; expected .* there are \['val_loss'\]"):
        result.best("val_los")
    with pytest.raises(ConfigurationError, match="mode: received 'lowest'; expected 'min' or 'max'"):
        result.best(mode="lowest")
    with pytest.raises(ConfigurationError, match="mode: received 'lowest'"):
        result.table(mode="lowest")
    with pytest.raises(ConfigurationError, match=r"none of the 1 complete experiments \(of 2\) has any"):
        result_of(experiment(tmp_path, "silent"), result.experiments[1]).best()


def test_texts_in_a_csv_file_stay_whole(tmp_path: Path) -> None:
    rows = [{"name": "a", "error": 'one, "two"\nthree'}, {"name": "b", "tags": ["x", "y"], "val_loss": 0.5}]
    read = list(csv.DictReader(as_csv(rows).splitlines(keepends=True)))
    assert read == [
        {"name": "a", "tags": "", "val_loss": "", "error": 'one, "two"\nthree'},
        {"name": "b", "tags": json.dumps(["x", "y"]), "val_loss": "0.5", "error": ""},
    ]


def test_a_result_is_shown_in_one_line(project: ModelTrainingFramework) -> None:
    result = run(project)
    assert str(result) == repr(result)
    assert repr(result) == (
        "<GridSearchResult 'grid': 2 of 3 experiments submitted or complete, 1 failed; output in "
        f"{project.project_root / 'out'}>"
    )


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **more: (figures.append(self), save(self, *given, **more))
    )
    experiments = [
        experiment(tmp_path, f"e{place}", values((0, "val_loss", 1.0), (1, "val_loss", 1.0 / (place + 1))))
        for place in range(7)
    ]
    result = result_of(*experiments, experiment(tmp_path, "silent"))
    result.plot(tmp_path / "new" / "losses.png")
    assert (tmp_path / "new" / "losses.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = [axes for figure in figures for axes in figure.axes]
    assert len(axes.lines) == 7
    assert [text.get_text().split()[1] for text in axes.get_legend().texts] == ["e6", "e5", "e4", "e3", "e2"]
    assert list(axes.lines[-1].get_ydata()) == [1.0, 1.0 / 7]
    with pytest.raises(ConfigurationError, match=r"metric: received 'loss'; expected .* there are \['val_loss'\]"):
        result.plot(tmp_path / "none.png", "loss")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*modelbatch-hybrid\[demo\]"):
        result.plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    "source",
    [
        "def build(config): ...",
        "class build: ...",
        "build = lambda config: None",
        "from elsewhere import build",
        "from elsewhere import other as build",
        "try:\n    from elsewhere import build\nexcept ImportError:\n    build = None",
        "from elsewhere import *",
        "def __getattr__(name): ...",
        "globals()['build'] = None",
        "locals()['build'] = None",
        "def register():\n    globals()['build'] = None\nregister()",
        "def register():\n    global build\n    build = None\nregister()",
        "import sys\ndef register(function):\n    sys.modules[__name__].build = function\n@register\ndef f(): ...",
        "from sys import modules\nmodules[__name__] = type('Module', (), {'build': None})",
        "import sys\nsys.modules[__name__].__dict__['build'] = None",
        "def register():\n    register.__globals__['build'] = None\nregister()",
        "import module_for_tests\nmodule_for_tests.build = None",
        "match (None,):\n    case (build,): ...",
        "match (None,):\n    case (*build,): ...",
        "match None:\n    case None as build: ...",
        "match {}:\n    case {**build}: ...",
    ],
)
def test_functions_that_may_be_there_are_not_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "module_for_tests.py").write_text(source)
    check_build_path("module_for_tests:build", tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def built(config): ...", "has no 'build'; expected .* Did you mean module_for_tests:built?"),
        ("def outer():\n    def build(config): ...", "has no 'build'"),
        ("import nothing", "has no 'build'"),
        ("class Own:\n    def __getattr__(self, name): return self.build", "has no 'build'"),
        ("def build(:", r"module_for_tests\.py, line 1 cannot be parsed"),
    ],
)
def test_functions_that_are_not_there_are_refused_before_anything_starts(
    source: str, expected: str, project: ModelTrainingFramework
) -> None:
    (project.project_root / "module_for_tests.py").write_text(source)
    with pytest.raises(ConfigurationError, match=expected):
        run(project, build="module_for_tests:build")
    assert not (project.project_root / "out").exists()
    assert "module_for_tests" not in sys.modules
