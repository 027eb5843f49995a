"""One training step of ResNet-18s: apart from the other kinds, because a round of it takes a minute."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.bars import bar_of_the_best
from benchmarks.comparison import CANNOT, small
from benchmarks.contestants import ON_JAX, ON_TORCH
from benchmarks.measure import Race
from benchmarks.plan import Choices, Plan
from benchmarks.workloads import ResNets

RACE = "ResNet-18, 2"
# Every contestant keeps its models in memory: four of each do not fit into 24 GiB. A step takes so long that there are
# few. Losses fall within them because the same two batches come again and again, at a rate at which they fall smoothly:
# at a higher one rounding grows with every step.
WORKLOAD = ResNets(
    num_models=2, batch=8, num_batches=2, optimizer="SGD with momentum", lowest_rate=1e-3, highest_rate=1e-3
)


def plan(choices: Choices) -> Plan:
    """Everyone who can train it, against the machine and each other."""
    workload = replace(WORKLOAD, device=choices.device)
    if choices.quick:
        workload = small(workload)
    everyone = [name for name in (*ON_TORCH, *ON_JAX) if "ResNet-18" not in CANNOT.get(name, {})]
    if choices.quick:
        everyone = [name for name in everyone if "compiled" not in name]
    race = Race(choices.present(everyone), workload, steps=1, warm_up=1, first_steps=1)
    return Plan("Training ResNet-18s", {RACE: race}, lambda results: [bar_of_the_best(results.timings[RACE])])
