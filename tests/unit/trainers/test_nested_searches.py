"""Experiments that would start their own grid search again are refused; projects whose files are called like ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainers.built import load_build
from trainers.config import ConfigurationError, ExecutionMode, ParameterGrid
from trainers.config.results import GridSearchResult
from trainers.searches.framework import ModelTrainingFramework
from trainers.searches.nested import environment_for

BASE = {
    "experiment_name": "run",
    "model": {"name": "mlp"},
    "training": {"epochs": 1},
    "data": {"dataset_name": "d"},
    "optimizer": {"name": "sgd"},
    "scheduler": None,
}
SCRIPT = """
from pathlib import Path
from trainers.config import ExecutionMode
from tests.unit.trainers.test_nested_searches import search
if __name__ == "__main__":
    with open("started", "a") as stream:
        stream.write("x")
    failed = search(Path.cwd(), Path("inner"), script_path="train.py").failed_submissions
"""
BUILD = """
import torch
from torch import nn
from trainers.built import Built
import helpers

def build(config):
    return Built(nn.Linear(2, 1), nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))])
"""


def search(project: Path, out: Path, **options: str) -> GridSearchResult:
    grid = ParameterGrid("rates")
    grid.add_parameter("optimizer.lr", [0.1])
    return ModelTrainingFramework(project).run_grid_search(
        [grid], BASE, execution_mode=ExecutionMode.LOCAL, output_dir=out, **options
    )


def test_search_at_the_import_of_its_build_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "searching_when_imported.py").write_text(
        "from pathlib import Path\n"
        "from tests.unit.trainers.test_nested_searches import search\n"
        "search(Path.cwd(), Path('out'), build='searching_when_imported:build')\n"
        "def build(config): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match='if __name__ == "__main__"'):
        load_build("searching_when_imported:build")
    assert not (tmp_path / "out").exists()


def test_script_within_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.touch()
    for name, value in environment_for(script).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="Start the grid search from another file"):
        search(tmp_path, tmp_path / "out", script_path="train.py")
    # Another one is no chain without end.
    (tmp_path / "other.py").touch()
    assert search(tmp_path, tmp_path / "out", script_path="other.py").failed_submissions == []


@pytest.mark.long
def test_script_that_starts_its_own_search(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    ((_, error),) = search(tmp_path, tmp_path / "out", script_path="train.py").failed_submissions
    assert "Start the grid search from another file" in error
    assert (tmp_path / "started").read_text() == "x"


@pytest.mark.long
def test_project_with_files_that_are_called_like_our_packages(tmp_path: Path) -> None:
    (tmp_path / "trainers").mkdir()
    for name in ("trainers/__init__.py", "mb_torch.py", "helpers.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "building.py").write_text(BUILD)
    result = search(tmp_path, tmp_path / "out", build="building:build")
    assert (result.submitted_jobs, result.failed_submissions) == (["local-0"], [])
