"""`modelbatch doctor`: what this installation can do, and whether it is what was tested.

Imports nothing that the library does not need: a diagnosis has to work where packages are missing.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from torch import nn

import mb_torch

BACKEND_VARIABLE = "MODELBATCH_BACKEND"


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


def doctor() -> bool:
    """Print versions and the state of every backend; return whether the default one works."""
    names = mb_torch.available_backends()
    chosen = os.environ.get(BACKEND_VARIABLE)
    default = chosen or "torch"
    source = f"from ${BACKEND_VARIABLE}" if chosen else f"${BACKEND_VARIABLE} is not set"
    print(f"modelbatch-hybrid {mb_torch.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads for torch")
    print(f"default backend: {default} ({source})")
    works = {}
    for name in names:
        report = examine(name)
        works[name] = "backend" in report
        print(f"backend {name}: {_describe(report) if works[name] else report['error']}")
    if default not in works:
        print(f"Problem: ${BACKEND_VARIABLE} is {default!r}, which is no backend; set it to one of {names}.")
    elif not works[default]:
        print(f"Problem: the default backend, {default}, does not work.")
    return works.get(default, False)


def _describe(report: dict[str, Any]) -> str:
    devices = f" on {report['platform']} x {report['devices']}" if "devices" in report else ""
    untested = report.get("untested_versions", {})
    versions = [
        f"{name} {version}" + (" (untested)" if name in untested else "")
        for name, version in report.get("versions", {}).items()
    ]
    return f"works{devices}" + (f" with {', '.join(versions)}" if versions else "")
