"""Submit a batch of experiments to Slurm, or write down what would be submitted where there is no Slurm.

Run it with ``python examples/slurm_batch.py``. Everything is written below ``runs/slurm_batch`` or the ``--output``
given: jobs outlive this script, so it is no temporary folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from model_training_framework import ExecutionMode, ModelTrainingFramework, ParameterGrid
from model_training_framework.config import NamingStrategy
from model_training_framework.utils import ensure_directory_exists, setup_logging

TRAINING_SCRIPT = Path(__file__).with_name("grid_search.py")
BASE: dict[str, Any] = {
    "experiment_name": "rings",
    "model": {"name": "mlp", "hidden_size": 32},
    "training": {"epochs": 20, "batch_size": 50},
    "data": {"dataset_name": "rings"},
    "optimizer": {"name": "adam"},
    "slurm": {"time_limit": "00:10:00", "cpus_per_task": 1, "mem": "2G", "requeue": True},
    "preemption": {"timeout_minutes": 1, "max_preemptions": 5},
}


def choose_mode(framework: ModelTrainingFramework) -> tuple[ExecutionMode, str]:
    """How to execute, and why."""
    if shutil.which("sbatch") is None:
        return ExecutionMode.DRY_RUN, "there is no sbatch on this machine"
    try:
        framework.get_slurm_launcher()
    except ImportError as error:
        return ExecutionMode.DRY_RUN, str(error)
    return ExecutionMode.SLURM, "sbatch is here"


def submit(folder: Path) -> None:
    grid = ParameterGrid("rates and seeds")
    grid.add_parameter("training.learning_rate", [0.001, 0.01])
    grid.add_parameter("seed", [0, 1, 2])
    framework = ModelTrainingFramework(project_root=TRAINING_SCRIPT.parent, config_dir=folder / "configs")
    mode, reason = choose_mode(framework)
    print(f"{mode.name}: {reason}")
    result = framework.run_grid_search(
        [grid],
        base_config=BASE,
        execution_mode=mode,
        output_dir=folder / "experiments",
        max_concurrent_jobs=2,  # tasks that may run at once
        naming_strategy=NamingStrategy.DESCRIPTIVE,
        script_path=TRAINING_SCRIPT.name,
    )
    for config, job_id in zip(result.generated_experiments, result.submitted_jobs, strict=False):
        print(f"{job_id}: {config.experiment_name}")
    for name, error in result.failed_submissions:
        print(f"failed: {name}: {error}")
    scripts = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.sbatch"))
    print(f"job scripts: {', '.join(scripts) or 'none, because the package with the Slurm launcher is not installed'}")
    if mode is ExecutionMode.DRY_RUN:
        commands = folder / "experiments" / "commands.txt"
        print(f"the commands of {len(commands.read_text().splitlines())} experiments are in {commands}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs", "slurm_batch"), help="default: %(default)s")
    folder = ensure_directory_exists(parser.parse_args().output.absolute())
    setup_logging(level="INFO", log_file=folder / "submission.log")
    submit(folder)


if __name__ == "__main__":
    main()
