"""Packs of small experiments: functions that build them, and what they end with."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.experiments import base_config
from trainers.built import Built
from trainers.checkpoints.files import read_checkpoint
from trainers.config import ConfigurationManager, create_experiment_config
from trainers.config.schema import ExperimentConfig
from trainers.packed.run import run_pack
from trainers.searches.packing import PACKS_FOLDER, pack_name

BUILD = "tests.packs:build"
ROWS, BATCH = 30, 8
# 4 batches an epoch.
BATCHES = 4

_GENERATOR = torch.Generator().manual_seed(7)
INPUTS = torch.randn(ROWS, 5, generator=_GENERATOR, dtype=torch.float64)
TARGETS = torch.randint(0, 3, (ROWS,), generator=_GENERATOR)


class Rows(Dataset):
    """Rows of the training data; at one of its accesses the process is stopped, if the environment says so."""

    accesses = 0

    def __init__(self, dtype: torch.dtype) -> None:
        self.inputs = INPUTS.to(dtype)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        Rows.accesses += 1
        if Rows.accesses == int(os.environ.get("STOP_AT", "-1")):
            how = os.environ["STOP_BY"]
            if how == "exception":
                raise OSError("the disk is gone")
            os.kill(os.getpid(), signal.Signals[how])
        return self.inputs[index], TARGETS[index]


def stop_at(monkeypatch: Any, batch: int, how: str) -> None:
    """Have the next pack of this process stopped while it loads a batch (from 0, over all epochs)."""
    epoch, place = divmod(batch, BATCHES)
    # The first batch is looked at once before the training.
    monkeypatch.setenv("STOP_AT", str(BATCH + epoch * ROWS + place * BATCH + 1))
    monkeypatch.setenv("STOP_BY", how)
    Rows.accesses = 0


def smoothed(outputs: Tensor, targets: Tensor, smoothing: Any = 0.0) -> Tensor:
    logs = torch.log_softmax(outputs, -1)
    return -(1 - smoothing) * logs.gather(1, targets[:, None]).mean() - smoothing * logs.mean()


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean()


def leave(outputs: Tensor, targets: Tensor) -> Tensor:
    sys.exit(4)


def build(config: ExperimentConfig) -> Built:
    if config.custom_params.get("is_bad"):
        raise ValueError("no such data")
    if config.custom_params.get("exits"):
        sys.exit(3)
    dtype = torch.float64 if config.model.custom_params.get("double") else torch.float32
    width = config.model.hidden_size
    model = nn.Sequential(
        nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(config.model.dropout), nn.Linear(width, 3)
    ).to(dtype)
    rows = Rows(dtype)
    val = [(rows.inputs[:12], TARGETS[:12]), (rows.inputs[12:], TARGETS[12:])]
    metric = leave if config.custom_params.get("exits_in_training") else accuracy
    return Built(model, smoothed, DataLoader(rows, BATCH, shuffle=True), val, metrics={"accuracy": metric})


def pack_config(name: str, **changes: Any) -> ExperimentConfig:
    """A small experiment; changes have dotted keys with ``__`` for the dots."""
    changes = {"optimizer__learning_rate": 0.1, **changes}
    # In both places, or a warning would say which one wins.
    changes["training__learning_rate"] = changes["optimizer__learning_rate"]
    content = base_config(
        experiment_name=name,
        model={"name": "mlp", "hidden_size": 6, "dropout": 0.25, "custom_params": {}},
        training={"epochs": 3},
        optimizer={"name": "sgd", "weight_decay": 0.0, "custom_params": {"momentum": 0.9}},
        scheduler=None,
        performance={"num_workers": 0},
        logging={"console_log": False},
        checkpoint={"monitor": "val_accuracy", "mode": "max"},
    )
    for key, value in changes.items():
        own = content
        *sections, last = key.split("__")
        for section in sections:
            own[section] = own.get(section) or {}
            own = own[section]
        own[last] = value
    return create_experiment_config(content)


def write_pack(
    out: Path, configs: Sequence[ExperimentConfig], *, build: str = BUILD, backend: str | None = None
) -> Path:
    """Write a pack as a grid search does; returns its folder."""
    manager = ConfigurationManager(out, out)
    names = [config.experiment_name for config in configs]
    for config in configs:
        manager.save_config(config, out / config.experiment_name / "config.yaml")
    folder = out / PACKS_FOLDER / pack_name(build, names)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pack.json").write_text(json.dumps({"build": build, "backend": backend, "experiments": names}))
    return folder


def run_packs(
    out: Path, configs: Sequence[ExperimentConfig], size: int | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """Run experiments in packs of a size, or all in one; returns what became of each."""
    size = size or len(configs)
    outcomes: dict[str, dict[str, Any]] = {}
    for start in range(0, len(configs), size):
        outcomes |= run_pack(write_pack(out, configs[start : start + size], **options))
    return outcomes


def states(outcomes: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: own["state"] for name, own in outcomes.items()}


def rows_of(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.reader(stream))[1:]


def end_of(out: Path, name: str) -> dict[str, Any]:
    """What an experiment has in its own folder, without what depends on the time."""
    last = read_checkpoint(out / name / "checkpoints" / "latest.ckpt")
    best = read_checkpoint(out / name / "checkpoints" / "best.ckpt")
    kept = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "global_step", "metrics")
    return {
        **{key: last[key] for key in kept},
        "has_stopped": bool(last["early_stopping"]["stopped"]),
        "best": {key: best[key] for key in ("model_state_dict", "epoch", "global_step", "metrics")},
        "csv": [(row[:3], float(row[3])) for row in rows_of(out / name)],
    }


def build_in_order(config: ExperimentConfig) -> Built:
    """As `build`, with batches that are never shuffled."""
    built = build(config)
    rows = built.train.dataset
    train = list(zip(rows.inputs.split(BATCH), TARGETS.split(BATCH), strict=True))
    return Built(built.model, built.loss_fn, train, built.val, metrics=built.metrics)
