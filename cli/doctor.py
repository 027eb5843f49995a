"""`modelbatch doctor`: what this installation can do, and whether it is what was tested."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mb_torch


def examine(backend: str) -> dict[str, Any]:
    """Train two small models on a backend and return its report; without a ``"backend"`` entry it does not work."""
    try:
        torch.manual_seed(0)
        batch = mb_torch.ModelBatch([nn.Linear(4, 2) for _ in range(2)], backend=backend)
        factory = mb_torch.OptimizerFactory(torch.optim.SGD)
        step = batch.make_train_step(nn.functional.mse_loss, factory.create_optimizer(batch, [{"lr": 0.1}] * 2))
        losses = [float(step(torch.ones(3, 4), torch.zeros(3, 2)).sum()) for _ in range(2)]
        report = batch.backend_report()
    except (mb_torch.ModelBatchError, ImportError) as error:
        return {"error": str(error)}
    if not losses[1] < losses[0]:
        return {"error": f"two models did not learn: the sum of their losses went from {losses[0]} to {losses[1]}"}
    return report


def doctor(console: Console) -> bool:
    """Print versions and the state of every backend; return whether the default one works."""
    console.print(
        f"modelbatch-hybrid {mb_torch.__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    console.print(f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads for torch")
    table = Table("backend", "state", "device", "versions")
    works = {}
    for name in mb_torch.available_backends():
        report = examine(name)
        works[name] = "backend" in report
        table.add_row(name, "works" if works[name] else report["error"], *_details(report))
    console.print(table)
    return works["torch"]


def _details(report: dict[str, Any]) -> tuple[str, str]:
    if "backend" not in report:
        return "", ""
    untested = report.get("untested_versions", {})
    versions = [
        f"{name} {version}" + (" (untested)" if name in untested else "")
        for name, version in report.get("versions", {}).items()
    ]
    devices = f"{report.get('platform', 'torch')} x {report['devices']}" if "devices" in report else "torch's"
    return devices, "\n".join(versions)
