"""The example scripts that the API document lists run as people run them, and say what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arch.repository import ROOT, SOURCE_FOLDERS

EXAMPLES = ROOT / "examples"
# "Examples" in the API document.
DOCUMENTED = ["basic_training.py", "grid_search.py", "slurm_batch.py", "custom_trainer.py", "preemption_handling.py"]


def run_example(name: str, folder: Path, *arguments: str, **environment: str) -> str:
    """What a script prints, started in ``folder``; no cluster is around unless the environment says so."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    # Only folders without sbatch and scontrol.
    inherited["PATH"] = str(Path(sys.executable).parent)
    inherited["PYTHONPATH"] = os.pathsep.join(str(source) for source in SOURCE_FOLDERS)
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_there_is_every_documented_example() -> None:
    assert {*DOCUMENTED} <= {path.name for path in EXAMPLES.glob("*.py")}
    assert all(f"def test_{Path(name).stem}" in Path(__file__).read_text(encoding="utf-8") for name in DOCUMENTED)


@pytest.mark.long
def test_basic_training(tmp_path: Path) -> None:
    printed = run_example("basic_training.py", tmp_path, "--output", "kept")
    accuracy = re.search(r"accuracy of the best on 1000 unseen points: ([\d.]+)%", printed)
    assert accuracy
    assert float(accuracy[1]) > 90
    checkpoints = re.search(r"checkpoints: (.+); best: (.+)", printed)
    assert checkpoints
    files = {path.name for path in (tmp_path / "kept" / "basic_training").iterdir()}
    assert files == {*checkpoints[1].split(", "), "best.ckpt", "latest.ckpt"}
    assert checkpoints[2] in checkpoints[1].split(", ")
    # Complete: the second start trains nothing, and says the same.
    assert run_example("basic_training.py", tmp_path, "--output", "kept") == printed


def test_custom_trainer(tmp_path: Path) -> None:
    printed = run_example("custom_trainer.py", tmp_path)
    epochs = re.findall(r"epoch (\d+), loss .+, mixed_in .+, lr .+, val_loss .+, val_accuracy ([\d.]+)", printed)
    assert [int(epoch) for epoch, _ in epochs] == [*range(len(epochs))]
    reached = [float(accuracy) >= 0.94 for _, accuracy in epochs]
    assert (sum(reached), reached[-1]) == (3, True)
    assert "training starts in phase INIT, after 0 steps\n" in printed
    assert "val_accuracy was 0.94 or more in 3 epochs" in printed
    assert f"complete: True, after {len(epochs)} of 50 epochs" in printed
    assert [*tmp_path.iterdir()] == []


@pytest.mark.long
def test_preemption_handling(tmp_path: Path) -> None:
    printed = run_example("preemption_handling.py", tmp_path)
    assert "saved after step 47, in epoch 2; the job was not requeued\nstarted again with the same command\n" in printed
    losses = re.findall(r"complete after step 100: loss (\S+)", printed)
    assert len(losses) == 2
    assert losses[0] == losses[1]
    compared = re.findall(r"^([\w ]+): (identical|different)$", printed, flags=re.MULTILINE)
    assert compared == [(what, "identical") for what in ("weights and buffers", "optimizer", "scheduler", "metrics")]


@pytest.mark.long
def test_preemption_handling_in_a_job_leaves_the_signal_to_slurm(tmp_path: Path) -> None:
    printed = run_example("preemption_handling.py", tmp_path, SLURM_JOB_ID="7")
    assert re.fullmatch(r"complete after step 100: loss \S+\n", printed)
    assert (tmp_path / "runs" / "preemption_handling" / "latest.ckpt").exists()


@pytest.mark.long
def test_grid_search(tmp_path: Path) -> None:
    printed = run_example("grid_search.py", tmp_path, "--output", "search")
    assert printed.startswith("4 experiments\n100% of 4 succeeded")
    results = re.findall(r"validation loss ([\d.]+): (\S+)", printed)
    losses = [float(loss) for loss, _ in results]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]
    expected = {f"rings_learning_rate={rate}_hidden_size={width}" for rate in (0.001, 0.1) for width in (8, 64)}
    assert {name for _, name in results} == expected
    experiments = tmp_path / "search" / "experiments"
    assert {path.name for path in experiments.iterdir() if path.is_dir()} == expected
    assert all((experiments / name / "checkpoints" / "latest.ckpt").exists() for name in expected)


def test_slurm_batch(tmp_path: Path) -> None:
    """Without Slurm nothing is submitted, which is said."""
    printed = run_example("slurm_batch.py", tmp_path)
    assert printed.startswith("DRY_RUN: there is no sbatch on this machine\n")
    assert len(re.findall(r"^DRY_RUN: rings_learning_rate=\S+_seed=\d$", printed, flags=re.MULTILINE)) == 6
    experiments = tmp_path / "runs" / "slurm_batch" / "experiments"
    assert f"the commands of 6 experiments are in {experiments / 'commands.txt'}" in printed
    commands = (experiments / "commands.txt").read_text().splitlines()
    assert all(str(EXAMPLES / "grid_search.py") in command for command in commands)
    assert len({*commands}) == 6
    assert (tmp_path / "runs" / "slurm_batch" / "submission.log").stat().st_size > 0


@pytest.mark.long
def test_slurm_batch_without_the_package_that_submits(tmp_path: Path) -> None:
    """Even beside a real sbatch, where the launcher is not installed."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\ntouch submitted\n")
    sbatch.chmod(0o755)
    # A package of the launcher's name in which the launcher is not.
    (tmp_path / "empty" / "slurm").mkdir(parents=True)
    (tmp_path / "empty" / "slurm" / "__init__.py").touch()
    path = os.pathsep.join(str(folder) for folder in (tmp_path / "empty", *SOURCE_FOLDERS))
    printed = run_example("slurm_batch.py", tmp_path, PATH=f"{tmp_path / 'bin'}", PYTHONPATH=path)
    assert printed.startswith(
        "DRY_RUN: executor 'slurm' needs slurm.executor:create_launcher, which cannot be imported"
    )
    assert "job scripts: none, because the package with the Slurm launcher is not installed" in printed
    assert not (tmp_path / "submitted").exists()
