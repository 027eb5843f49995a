"""The training step of many small MLPs on JAX: ours, written by hand, and what must hold between them."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.bars import FUSED, PEER, bars_of_jax
from benchmarks.contestants import ON_JAX, TOGETHER
from benchmarks.measure import Race
from benchmarks.plan import Choices, Plan
from benchmarks.workloads import MLPs


def plan(choices: Choices) -> Plan:
    """Many models; all counts of steps are multiples of what contestants do in one call."""
    many = MLPs(device=choices.device)
    if choices.quick:
        many = replace(many, num_models=4, hidden=16)
    everyone = choices.present(["loop", PEER, FUSED, *ON_JAX])
    return Plan(
        "One training step of many MLPs on JAX",
        {"many": Race(everyone, many, steps=2 * TOGETHER, warm_up=TOGETHER, first_steps=TOGETHER)},
        lambda results: bars_of_jax(results.timings["many"]),
    )
