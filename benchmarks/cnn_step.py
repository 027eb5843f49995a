"""The training step of many small CNNs on PyTorch and on JAX, where the form of convolution matters most."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.bars import FUSED, JAX_FUSED, bars_of_cnns
from benchmarks.contestants import CONVOLUTIONS
from benchmarks.measure import Race
from benchmarks.plan import Choices, Plan
from benchmarks.workloads import CNNs


def plan(choices: Choices) -> Plan:
    """Many models."""
    many = CNNs(device=choices.device)
    if choices.quick:
        # At a higher rate losses fall within a few steps.
        many = replace(many, num_models=4, side=4, channels=(2, 4), lowest_rate=1e-2, highest_rate=1e-2)
    everyone = choices.present(["loop", FUSED, JAX_FUSED, *CONVOLUTIONS])
    return Plan(
        "One training step of many CNNs",
        {"many": Race(everyone, many, steps=6, warm_up=2)},
        lambda results: bars_of_cnns(results.timings["many"]),
    )
