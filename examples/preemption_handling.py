"""A run that is stopped by a signal, started again, and ends as if it had never been stopped.

Run it with ``python examples/preemption_handling.py``: outside Slurm the script plays the cluster's part. It trains
once without a stop; then again, sending itself SIGUSR1 in the middle of an epoch; starts that run once more; and
compares.

In a Slurm job it only trains, in ``runs/preemption_handling`` or the ``--output`` given, and leaves signals and new
starts to the cluster: ``sbatch --requeue --signal=B:USR1@120 --wrap "exec python examples/preemption_handling.py"``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from model_training_framework.trainer import GenericTrainer, GenericTrainerConfig, TrainingCallback

EPOCHS, ROWS, BATCH = 5, 320, 16
STOP_AFTER = 47  # steps; in the third epoch


class Waves(Dataset):
    """Noisy sine waves; the noise is drawn anew each time, so that a repeated or lost sample would show."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        frequency = 1 + index / ROWS
        wave = torch.sin(frequency * torch.linspace(0, 6, 32))
        return wave + 0.1 * torch.randn(32), torch.tensor([frequency])


class SignalToSelf(TrainingCallback):
    """What a cluster does to a job: it sends the process a signal."""

    def on_batch_end(self, trainer: GenericTrainer, batch_idx: int, logs: dict[str, Any]) -> None:
        if trainer.global_step == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGUSR1)


def train(folder: Path, *, is_stopped: bool = False) -> GenericTrainer:
    """The whole program of a job; what was done before is found in the folder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=EPOCHS * ROWS // BATCH)
    loader = DataLoader(Waves(), batch_size=BATCH, shuffle=True)
    config = GenericTrainerConfig(
        checkpoint_dir=str(folder),
        max_epochs=EPOCHS,
        scheduler_interval="step",
        signals=["SIGUSR1", "SIGTERM"],
        max_preemptions=10,
    )
    trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
    if is_stopped:
        trainer.add_callback(SignalToSelf())
    trainer.fit(model, optimizer, loader, scheduler=scheduler)
    return trainer


def tell(trainer: GenericTrainer) -> None:
    """Say how far a run came."""
    if trainer.preempted:
        requeued = "requeued" if trainer.requeued else "not requeued"
        print(f"saved after step {trainer.global_step}, in epoch {trainer.current_epoch}; the job was {requeued}")
    else:
        print(f"complete after step {trainer.global_step}: loss {trainer.logs['loss']:.10f}")


def is_equal(one: Any, other: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other)


def rehearse(folder: Path) -> None:
    whole = train(folder / "never stopped")
    tell(whole)
    tell(train(folder / "stopped", is_stopped=True))
    print("started again with the same command")
    resumed = train(folder / "stopped", is_stopped=True)
    tell(resumed)
    pairs = {
        "weights and buffers": (whole.model.state_dict(), resumed.model.state_dict()),
        "optimizer": (whole.optimizer.state_dict(), resumed.optimizer.state_dict()),
        "scheduler": (whole.scheduler.state_dict(), resumed.scheduler.state_dict()),
        "metrics": (whole.logs, resumed.logs),
    }
    for what, (expected, found) in pairs.items():
        print(f"{what}: {'identical' if is_equal(expected, found) else 'different'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, help="folder of the checkpoints (default outside Slurm: a temporary one)"
    )
    options = parser.parse_args()
    if "SLURM_JOB_ID" in os.environ:
        trainer = train(options.output or Path("runs", "preemption_handling"))
        tell(trainer)
        sys.exit(trainer.exit_code)
    print("not in a Slurm job: this script sends itself the signal and starts itself again")
    with tempfile.TemporaryDirectory() as temporary:
        rehearse(options.output or Path(temporary))


if __name__ == "__main__":
    main()
