"""One training step of many small MLPs: ours, the alternatives, and what must hold between them."""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.bars import EAGER, FUSED, Bar, bars_of_many, bars_of_memory, bars_of_one
from benchmarks.contestants import ON_JAX, ON_TORCH, ONE_RATE
from benchmarks.measure import Race
from benchmarks.plan import Choices, Plan
from benchmarks.results import Results
from benchmarks.workloads import MLPs


def plan(choices: Choices) -> Plan:
    """Many models, the same with a learning rate each, a single one, and the memory of large ones."""
    many = MLPs(device=choices.device)
    large = replace(many, num_models=16, features=1024, hidden=1024, classes=1024, batch=16)
    if choices.quick:
        many = replace(many, num_models=4, hidden=16)
        large = replace(large, num_models=4, hidden=64)
    everyone = choices.present([*ON_TORCH])
    # A smoke run compiles for the first race only.
    later = [name for name in everyone if not choices.quick or "compiled" not in name]
    sweep = replace(many, lowest_rate=1e-4, highest_rate=1e-2)
    return Plan(
        "One training step of many MLPs",
        {
            "many": Race(everyone, many, steps=20, warm_up=4),
            "sweep": Race([name for name in later if name not in ONE_RATE], sweep, steps=20, warm_up=4),
            "one": Race(["loop", FUSED, EAGER], replace(many, num_models=1), steps=300, warm_up=60),
        },
        _bars,
        # Memory is that of the process as Linux counts it, which a GPU's is not part of.
        (*later, *choices.present([*ON_JAX])) if sys.platform == "linux" and choices.device == "cpu" else (),
        large,
    )


def _bars(results: Results) -> list[Bar]:
    timings = results.timings
    return [*bars_of_many(timings["many"]), *bars_of_one(timings["one"]), *bars_of_memory(results.memory)]
