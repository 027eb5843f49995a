"""Train a small classifier with checkpoints, and take the best of them.

Run it with ``python examples/basic_training.py``. With ``--output runs`` the checkpoints are kept: stop it with Ctrl-C
and run it again, and it goes on where it was.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from model_training_framework.trainer import GenericTrainer, GenericTrainerConfig

EPOCHS = 12


def make_loader(rows: int, seed: int, *, shuffle: bool) -> DataLoader:
    """Points in a square, labelled by whether they lie within a ring."""
    points = torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    radius = points.norm(dim=1)
    labels = ((radius > 0.7) & (radius < 1.6)).long()
    return DataLoader(TensorDataset(points, labels), batch_size=64, shuffle=shuffle)


def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Share of the points that the model labels right."""
    with torch.no_grad():
        right = [model(points).argmax(1) == labels for points, labels in loader]
    return float(torch.cat(right).float().mean())


def train(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    validation = make_loader(1000, seed=2, shuffle=False)

    config = GenericTrainerConfig(
        checkpoint_dir=str(folder),
        experiment_name="basic_training",
        max_epochs=EPOCHS,
        monitor="val_loss",  # says which checkpoint is the best
        save_top_k=3,
        early_stopping_patience=4,
    )
    trainer = GenericTrainer(config, loss_fn=nn.functional.cross_entropy)
    trainer.fit(model, optimizer, make_loader(2000, seed=1, shuffle=True), validation, scheduler)

    print(f"{trainer.global_step} steps in {trainer.current_epoch + 1} epochs")
    print(f"loss {trainer.logs['loss']:.4f}, validation loss {trainer.logs['val_loss']:.4f}")
    checkpoints = folder / "basic_training"
    trainer.load_checkpoint(checkpoints / "best.ckpt")  # into the model
    files = [path.name for path in sorted(checkpoints.glob("epoch_*.ckpt"))]
    print(f"checkpoints: {', '.join(files)}; best: {(checkpoints / 'best.ckpt').resolve().name}")
    print(f"accuracy of the best on 1000 unseen points: {accuracy(model, validation):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the checkpoints (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        train(options.output or Path(temporary))


if __name__ == "__main__":
    main()
