"""Small configurations and grids that tests of grid searches start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainers.config import ParameterGrid


def base_config(**changes: Any) -> dict[str, Any]:
    """A complete configuration with every section that has no defaults, and some that have."""
    config: dict[str, Any] = {
        "experiment_name": "run",
        "model": {"name": "mlp", "custom_params": {"depth": 2}},
        "training": {"epochs": 3},
        "data": {"dataset_name": "digits"},
        "optimizer": {"name": "sgd"},
        "scheduler": {"name": "step", "gamma": 0.5},
        "logging": {"log_every_n_steps": 7},
        "tags": ["a", "b"],
    }
    return {**config, **changes}


def grid_of(parameters: dict[str, Any], name: str = "grid") -> ParameterGrid:
    """A grid with these parameters."""
    grid = ParameterGrid(name)
    for key, values in parameters.items():
        grid.add_parameter(key, values)
    return grid


def make_project(root: Path, script: str = "") -> Path:
    """A project folder with a training script, which finds its options in `options` and its folder in `folder`."""
    (root / "scripts").mkdir(parents=True)
    (root / "scripts" / "train.py").write_text(_OPTIONS + script)
    return root


_OPTIONS = """
import pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
folder = pathlib.Path(options["--output-dir"])
"""
