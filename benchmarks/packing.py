"""`python -m benchmarks.packing`: 64 experiments on the digits, packed and one after another, from start to files.

Unlike in the other benchmarks, whole runs are timed: building, loading, training, validation, metrics, checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import report
from benchmarks.bars import Bar
from benchmarks.command import RESULTS
from benchmarks.measure import Disagreement, Spread
from trainers.built import Built, build_experiment
from trainers.config import ExperimentConfig, create_experiment_config
from trainers.config.files import write_atomically, written
from trainers.config.manager import ConfigurationManager
from trainers.generic import GenericTrainer
from trainers.packed.run import run_pack
from trainers.searches.executors import CONFIG_FILE
from trainers.searches.packing import PACK_FILE, PACKS_FOLDER, pack_name
from trainers.settings import GenericTrainerConfig

NUM_EXPERIMENTS, EPOCHS = 64, 10
BUILD = "benchmarks.packing:build"
PACKED, PACKS_OF_ONE, ALONE = "one pack", "packs of one", "GenericTrainer, one after another"
# In float32, after some hundred steps of Adam.
TOLERANCE = 1e-2


@functools.cache
def _digits() -> tuple[TensorDataset, TensorDataset]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return TensorDataset(inputs[:1500], labels[:1500]), TensorDataset(inputs[1500:], labels[1500:])


def build(config: ExperimentConfig) -> Built:
    """An MLP on scikit-learn's digits."""
    train, val = _digits()
    hidden = config.model.hidden_size
    return Built(
        nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)),
        nn.functional.cross_entropy,
        DataLoader(train, batch_size=config.training.batch_size, shuffle=True),
        DataLoader(val, batch_size=len(val)),
    )


def experiments(count: int, epochs: int) -> list[ExperimentConfig]:
    """Other learning rates and seeds."""
    return [
        create_experiment_config(
            {
                "experiment_name": f"digits_{number:02d}",
                "model": {"name": "mlp", "hidden_size": 128},
                "training": {"epochs": epochs, "batch_size": 64, "learning_rate": 1e-4 * 100 ** (number / count)},
                "data": {"dataset_name": "digits"},
                "optimizer": {"name": "adam", "weight_decay": 0.0},
                "performance": {"num_workers": 0},
                "logging": {"console_log": False, "log_level": "ERROR"},
                "seed": number,
            }
        )
        for number in range(count)
    ]


def run_in_packs(folder: Path, configs: Sequence[ExperimentConfig], size: int) -> None:
    """As a grid search with ``build=`` runs them, in this process."""
    for start in range(0, len(configs), size):
        names = [config.experiment_name for config in configs[start : start + size]]
        own = folder / PACKS_FOLDER / pack_name(BUILD, names)
        write_atomically(own / PACK_FILE, written({"build": BUILD, "backend": "torch", "experiments": names}, "json"))
        for name, outcome in run_pack(own).items():
            if outcome["state"] != "COMPLETED":
                raise Disagreement(f"{name}: {outcome}")


def run_alone(folder: Path, configs: Sequence[ExperimentConfig]) -> None:
    """Each as a plain module, through the trainer."""
    for config in configs:
        built = build_experiment(build, config)
        own = GenericTrainerConfig.from_experiment_config(config)
        own.checkpoint_dir, own.experiment_name = str(folder / config.experiment_name / "checkpoints"), None
        own.seed = 0  # the order of the data, as in a pack
        rate = config.optimizer.learning_rate
        assert rate is not None
        optimizer = torch.optim.Adam(built.model.parameters(), lr=rate)
        GenericTrainer(own, loss_fn=built.loss_fn).fit(built.model, optimizer, built.train, built.val)


CONTESTANTS: dict[str, Callable[[Path, Sequence[ExperimentConfig]], None]] = {
    PACKED: lambda folder, configs: run_in_packs(folder, configs, len(configs)),
    PACKS_OF_ONE: lambda folder, configs: run_in_packs(folder, configs, 1),
    ALONE: run_alone,
}


def timed_run(name: str, configs: Sequence[ExperimentConfig]) -> tuple[float, list[dict[str, torch.Tensor]]]:
    """Seconds of a run in an empty folder, and the weights that its checkpoints have."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        manager = ConfigurationManager(folder, folder)
        for config in configs:
            manager.save_config(config, folder / config.experiment_name / CONFIG_FILE)
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            CONTESTANTS[name](folder, configs)
        seconds = time.perf_counter() - start
        files = [folder / config.experiment_name / "checkpoints" / "latest.ckpt" for config in configs]
        return seconds, [torch.load(file, weights_only=True)["model_state_dict"] for file in files]


def check_same_weights(weights: dict[str, list[dict[str, torch.Tensor]]]) -> float:
    """Return the largest difference from those of the first contestant."""
    (first, expected), *others = weights.items()
    largest = 0.0
    for name, models in others:
        for ours, theirs in zip(expected, models, strict=True):
            if set(ours) != set(theirs):
                raise Disagreement(f"{name} has parameters {sorted(theirs)}, {first} {sorted(ours)}")
            differences = [float((ours[key] - theirs[key]).abs().max()) for key in ours]
            if not all(difference <= TOLERANCE for difference in differences):
                raise Disagreement(f"{name}: weights differ by {differences} from those of {first}; bound {TOLERANCE}")
            largest = max(largest, *differences)
    return largest


@dataclass(frozen=True)
class Measured:
    """What the rounds gave.

    Attributes:
        where: The machine.
        experiments: How many.
        epochs: Of each.
        seconds: Of each contestant, one entry a round.
        difference: The largest in final weights.
        bars: What must hold.
    """

    where: dict[str, Any]
    experiments: int
    epochs: int
    seconds: dict[str, list[float]]
    difference: float
    bars: list[Bar]

    def page(self) -> str:
        """As Markdown."""
        spreads = {name: Spread.of(own) for name, own in self.seconds.items()}
        rows = [
            [
                name,
                f"{spread.median:.2f} ({spread.lower:.2f}-{spread.upper:.2f})",
                f"{spreads[ALONE].median / spread.median:.1f}",
            ]
            for name, spread in spreads.items()
        ]
        parts = [
            f"# {self.experiments} experiments: digits, MLP 64-128-10, batch 64, Adam, {self.epochs} epochs",
            ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.where.items()),
            f"Whole runs in one process, with building, validation, metrics and checkpoints every epoch: medians of "
            f"{len(self.seconds[PACKED])} paired rounds, with quartiles. Final weights differ by "
            f"{self.difference:.0e} at most.",
            report.table(["contestant", "s", f"x as fast as {ALONE}"], rows),
        ]
        return "\n\n".join([*parts, *(["## What must hold", report.bars_table(self.bars)] if self.bars else [])])

    def write(self, folder: Path) -> None:
        """Keep the page and the data."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {**asdict(self), "bars": [{**asdict(bar), "holds": bar.holds} for bar in self.bars]}
        (folder / "packing.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "packing.md").write_text(self.page() + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all contestants; return 0 if they agree and the bound holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="paired rounds (default 15)")
    parser.add_argument("--quick", action="store_true", help="few experiments, two rounds, no bound, no files")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    rounds = 2 if options.quick else options.rounds
    configs = experiments(3, 1) if options.quick else experiments(NUM_EXPERIMENTS, EPOCHS)
    torch.set_num_threads(min(2, report.cores()))
    logging.disable(logging.WARNING)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    difference = 0.0
    for number in range(rounds + 1):
        weights = {}
        # Another order each time; the first round is not counted.
        order = [*CONTESTANTS][number % 3 :] + [*CONTESTANTS][: number % 3]
        for name in order:
            taken, weights[name] = timed_run(name, configs)
            if number:
                seconds[name].append(taken)
        difference = max(difference, check_same_weights(weights))
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    fastest = min((PACKS_OF_ONE, ALONE), key=lambda name: Spread.of(seconds[name]).median)
    ratio = Spread.of([slow / fast for slow, fast in zip(seconds[fastest], seconds[PACKED], strict=True)])
    bars = [] if options.quick else [Bar(f"{fastest} / {PACKED}", ratio, 5.0, at_least=True)]
    where = report.machine(torch.get_num_threads(), None)
    measured = Measured(where, len(configs), configs[0].training.epochs, seconds, difference, bars)
    print(measured.page())
    if not options.quick:
        measured.write(options.output)
    return int(not all(bar.holds for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
