"""What `GenericTrainer` adds to a step of about ten milliseconds, over a loop written by hand that makes the same."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.bars import FUSED, TRAINED, TRAINED_BATCH, bars_of_trainer
from benchmarks.measure import Race
from benchmarks.plan import Choices, Plan
from benchmarks.workloads import MLPs


def plan(choices: Choices) -> Plan:
    """A single module, and many models in a batch with its fused step."""
    # Sizes for which a step takes about ten milliseconds on two cores.
    one = MLPs(num_models=1, features=512, hidden=1536, batch=128, device=choices.device)
    many = MLPs(num_models=64, hidden=256, device=choices.device)
    if choices.quick:
        one, many = replace(one, features=16, hidden=16), replace(many, num_models=4, hidden=16)
    return Plan(
        "What GenericTrainer adds to a step of about 10 ms",
        {
            "one": Race(["loop", TRAINED], one, steps=20, warm_up=4),
            "many": Race(["loop", FUSED, TRAINED_BATCH], many, steps=20, warm_up=4),
        },
        bars_of_trainer,
    )
