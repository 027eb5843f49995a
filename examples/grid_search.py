"""Search a grid of hyper-parameters: one training process for each combination, two at a time.

Run it with ``python examples/grid_search.py``; ``--output runs/search`` keeps what it writes. This file is also the
training script of its search: with ``--config``, ``--experiment-name`` and ``--output-dir`` it trains one experiment.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from model_training_framework import ExecutionMode, ModelTrainingFramework, NamingStrategy
from model_training_framework.config import ConfigurationManager, ParameterGrid, create_experiment_config
from model_training_framework.trainer import GenericTrainer, GenericTrainerConfig

BASE: dict[str, Any] = {
    "experiment_name": "rings",
    "model": {"name": "mlp", "hidden_size": 8},
    "training": {"epochs": 6, "batch_size": 50, "learning_rate": 0.01},
    "data": {"dataset_name": "rings"},
    "optimizer": {"name": "adam"},
    "logging": {"console_log": False},
    "seed": 0,
}


def make_grid() -> ParameterGrid:
    grid = ParameterGrid("rates and widths", description="how fast, and how wide")
    grid.add_parameter("training.learning_rate", [0.001, 0.1])
    grid.add_nested_parameter("model.hidden_size", [8, 64])
    return grid


def search(folder: Path) -> None:
    grid = make_grid()
    print(f"{grid.get_parameter_count()} experiments")
    framework = ModelTrainingFramework(project_root=Path(__file__).parent, config_dir=folder / "configs")
    result = framework.run_grid_search(
        [grid],
        base_config=BASE,
        execution_mode=ExecutionMode.LOCAL,
        output_dir=folder / "experiments",
        max_concurrent_jobs=2,
        naming_strategy=NamingStrategy.DESCRIPTIVE,
        script_path=Path(__file__).name,
    )
    print(f"{result.success_rate:.0%} of {result.total_experiments} succeeded in {result.execution_time:.0f} s")
    for name, error in result.failed_submissions:
        print(f"failed: {name}: {error}")
    complete = [row for row in result.table() if row["state"] == "COMPLETED"]  # also in results.csv of that folder
    for row in sorted(complete, key=lambda row: row["val_loss"]):
        print(f"validation loss {row['val_loss']:.4f}: {row['name']}")


def make_loader(rows: int, seed: int, batch_size: int) -> DataLoader:
    """Points in a square, labelled by whether they lie within a ring."""
    points = torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    radius = points.norm(dim=1)
    labels = ((radius > 0.7) & (radius < 1.6)).long()
    return DataLoader(TensorDataset(points, labels), batch_size, shuffle=True)


def train(config_path: Path, folder: Path) -> int:
    """One experiment, of which everything is said by its configuration; returns the exit code."""
    manager = ConfigurationManager(project_root=Path(__file__).parent, config_dir=folder)
    config = create_experiment_config(manager.load_config(config_path))
    torch.manual_seed(config.seed or 0)
    width, rate = config.model.hidden_size, config.training.learning_rate
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    settings = GenericTrainerConfig.from_experiment_config(config)
    settings.checkpoint_dir, settings.experiment_name = str(folder / "checkpoints"), None
    settings.logging.csv_log_dir = str(folder)  # metrics.csv, where the search finds them
    trainer = GenericTrainer(settings, loss_fn=nn.functional.cross_entropy)
    trainer.fit(
        model,
        torch.optim.Adam(model.parameters(), lr=rate),
        make_loader(1000, 1, config.training.batch_size),
        make_loader(500, 2, config.training.batch_size),
    )
    return trainer.exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the search (default: a temporary one)")
    experiment = parser.add_argument_group("one experiment, as the search starts it")
    experiment.add_argument("--config", type=Path)
    experiment.add_argument("--experiment-name")
    experiment.add_argument("--output-dir", type=Path)
    options = parser.parse_args()
    if options.config is not None:
        sys.exit(train(options.config, options.output_dir))
    with tempfile.TemporaryDirectory() as temporary:
        search((options.output or Path(temporary)).absolute())


if __name__ == "__main__":
    main()
