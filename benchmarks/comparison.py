"""One training step of many models of each kind: every way to train them, against each other and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import plots
from benchmarks.bars import COMPILED, EAGER, FUSED, bars_of_comparison
from benchmarks.contestants import ON_JAX, ON_TORCH, TOGETHER
from benchmarks.measure import Race
from benchmarks.plan import Choices, Plan
from benchmarks.workloads import CNNs, LSTMs, MLPs, ResNets, Transformers, Workload

KINDS: dict[str, Workload] = {
    "MLP": MLPs(),
    "CNN": CNNs(),
    # Adam magnifies rounding where a gradient is zero, as that of a bias before BatchNorm is.
    "BatchNorm CNN": CNNs(batch_norm=True, optimizer="SGD with momentum", lowest_rate=1e-2, highest_rate=1e-2),
    "transformer": Transformers(num_models=32, batch=32, optimizer="AdamW"),
    "LSTM": LSTMs(),
}

# What a contestant cannot train, and why; found by trying. Everyone else must train everything.
CANNOT: dict[str, dict[str, str]] = {
    "torchmb 0.2": {
        "CNN": "Flatten is not registered",
        "BatchNorm CNN": "Flatten is not registered",
        "transformer": "TransformerEncoder is not registered",
        "LSTM": "LSTM is not registered",
    },
    "modelbatch 0.1.0": {"LSTM": "vmap has no rule for PyTorch's LSTM"},
}

# A round of slow workloads has fewer steps.
STEPS = {"transformer": 4, "CNN": 4, "BatchNorm CNN": 4, "LSTM": 4}
LARGE = 512


def plan(choices: Choices) -> Plan:
    """Each kind with as many models as its bound is for, and with one; with `full`, other numbers and inputs."""
    races = {}
    for kind, workload in KINDS.items():
        own = replace(workload, device=choices.device)
        if choices.quick:
            if kind in SMOKE:
                races[kind] = _race(kind, small(own), choices, steps=2)
            continue
        for num_models in _numbers(kind, own, choices):
            steps = STEPS.get(kind, TOGETHER) if num_models < LARGE else 4
            races[f"{kind}, {num_models}"] = _race(kind, replace(own, num_models=num_models), choices, steps=steps)
        if choices.full:
            steps = STEPS.get(kind, TOGETHER)
            races[f"{kind}, own inputs"] = _race(kind, replace(own, shared_input=False), choices, steps=steps)
            slow: dict[str, Any] = {"lowest_rate": 1e-3, "highest_rate": 1e-3}
            other = "SGD with momentum" if own.optimizer == "AdamW" else "AdamW"
            races[f"{kind}, {other}"] = _race(kind, replace(own, optimizer=other, **slow), choices, steps=steps)
    return Plan("Training many models of each kind", races, bars_of_comparison, draw=plots.draw)


def _numbers(kind: str, workload: Workload, choices: Choices) -> Sequence[int]:
    if choices.full:
        return (1, 8, 64, 256, 1024)
    return (1, 64, 256, 1024) if kind == "MLP" else (1, workload.num_models)


def _race(kind: str, workload: Workload, choices: Choices, *, steps: int) -> Race:
    everyone = [name for name in (*ON_TORCH, *ON_JAX) if kind not in CANNOT.get(name, {})]
    if choices.quick:
        # Another benchmark's smoke run compiles.
        everyone = [name for name in everyone if "compiled" not in name]
    if workload.num_models == 1:
        # What batching costs who does not need it.
        everyone, steps = ["loop", EAGER, FUSED, COMPILED], 5 * steps
    return Race(choices.present(everyone), workload, steps=steps, warm_up=steps, first_steps=steps)


# Each of these has what others have not.
SMOKE = ["MLP", "BatchNorm CNN"]
_SMALL_SIZES: dict[type[Workload], dict[str, Any]] = {
    MLPs: {"hidden": 8, "features": 8},
    CNNs: {"side": 4, "channels": (2, 3)},
    Transformers: {"length": 4, "width": 8, "heads": 2, "hidden": 8, "layers": 2},
    LSTMs: {"length": 4, "features": 4, "hidden": 4},
    ResNets: {"side": 8, "width": 2},
}


def small(workload: Workload) -> Workload:
    """The same kind, as small as makes sense; at a higher rate, so that losses fall within a few steps."""
    sizes = _SMALL_SIZES[type(workload)]
    common: dict[str, Any] = {
        "num_models": 2,
        "batch": 4,
        "classes": 4,
        "num_batches": 4,
        "lowest_rate": 1e-2,
        "highest_rate": 1e-2,
    }
    return replace(workload, **common, **sizes)
