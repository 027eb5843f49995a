"""A trainer with step functions, hooks and callbacks of its own: mixup, accuracy, a stop at a wanted value.

Run it with ``python examples/custom_trainer.py``; ``--output runs`` keeps the checkpoints.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from model_training_framework.config import LoggingConfig
from model_training_framework.trainer import (
    GenericTrainer,
    GenericTrainerConfig,
    ResumeState,
    TrainerError,
    TrainerPhase,
    TrainingCallback,
)

CLASSES, FEATURES = 4, 16


class MixupTrainer(GenericTrainer):
    """Trains on mixtures of samples and of their labels (mixup, Zhang et al., arXiv:1710.09412)."""

    def __init__(self, config: GenericTrainerConfig, strength: float) -> None:
        super().__init__(config)
        self.mixing = torch.distributions.Beta(strength, strength)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        inputs, labels = batch
        share = self.mixing.sample()
        other = torch.randperm(len(inputs))
        outputs = self.model(share * inputs + (1 - share) * inputs[other])
        own, mixed = (nn.functional.cross_entropy(outputs, target) for target in (labels, labels[other]))
        # Everything in the dict is averaged over the epoch; "loss" is what is differentiated.
        return {"loss": share * own + (1 - share) * mixed, "mixed_in": 1 - share, "lr": self.rate()}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        inputs, labels = batch
        outputs = self.model(inputs)
        right: Tensor = (outputs.argmax(1) == labels).float()
        return {"val_loss": nn.functional.cross_entropy(outputs, labels), "val_accuracy": right.mean()}

    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def on_training_start(self) -> None:
        super().on_training_start()
        print(f"training starts in phase {self.current_phase.name}, after {self.global_step} steps")

    def on_resume_from_checkpoint(self, resume_state: ResumeState) -> None:
        super().on_resume_from_checkpoint(resume_state)
        print(f"the run goes on in epoch {resume_state.epoch}")


class Report(TrainingCallback):
    """Prints a line an epoch."""

    def on_epoch_end(self, trainer: GenericTrainer, epoch: int, logs: dict[str, Any]) -> None:
        print(", ".join([f"epoch {epoch}", *(f"{key} {value:.4g}" for key, value in logs.items())]))


class StopAt(TrainingCallback):
    """Ends the run when a metric was good enough several times; what it has counted is part of every checkpoint."""

    def __init__(self, key: str, wanted: float, times: int) -> None:
        self.key, self.wanted, self.times = key, wanted, times
        self.reached = 0

    def on_epoch_end(self, trainer: GenericTrainer, epoch: int, logs: dict[str, Any]) -> None:
        self.reached += logs[self.key] >= self.wanted
        if self.reached >= self.times:
            trainer.stop_training = True

    def on_training_end(self, trainer: GenericTrainer, logs: dict[str, Any]) -> None:
        print(f"{self.key} was {self.wanted} or more in {self.reached} epochs, at the end {logs[self.key]:.3f}")

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached = state["reached"]


def make_loader(rows: int, seed: int, *, shuffle: bool) -> DataLoader:
    """Points around one centre a class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(CLASSES, FEATURES) * 3
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    inputs = centres[labels] + torch.randn(rows, FEATURES, generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=50, shuffle=shuffle)


def train(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)

    config = GenericTrainerConfig(
        checkpoint_dir=str(folder),
        experiment_name="custom_trainer",
        max_epochs=50,
        monitor="val_accuracy",
        mode="max",
        logging=LoggingConfig(console_log=False),  # a callback reports instead
    )
    trainer = MixupTrainer(config, strength=0.4)
    trainer.add_callback(Report())
    trainer.add_callback(StopAt("val_accuracy", 0.94, times=3))
    try:
        trainer.fit(
            model,
            optimizer,
            make_loader(1000, seed=1, shuffle=True),
            make_loader(500, seed=2, shuffle=False),
            scheduler,
        )
    except TrainerError as error:
        raise SystemExit(f"training cannot go on: {error}") from error
    is_complete = trainer.current_phase is TrainerPhase.TRAINING_COMPLETE
    print(f"complete: {is_complete}, after {trainer.current_epoch + 1} of {config.max_epochs} epochs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the checkpoints (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        train(options.output or Path(temporary))


if __name__ == "__main__":
    main()
