"""What must hold: bounds on ratios of times and of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.contestants import ONE_RATE
from benchmarks.measure import Memory, Spread, Timings


@dataclass(frozen=True)
class Bar:
    """One bound.

    Attributes:
        what: The measured ratio, in words.
        measured: Its value; of times the median over rounds with its spread.
        limit: The bound.
        at_least: Whether the value may not be smaller than the limit; otherwise not larger.
    """

    what: str
    measured: Spread
    limit: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the median keeps the bound."""
        return self.measured.median >= self.limit if self.at_least else self.measured.median <= self.limit


BY_HAND = [*ONE_RATE, "by hand, rate per model"]
PEER = "modelbatch 0.1.0"
EAGER, FUSED, COMPILED = "ours, documented step", "ours, make_train_step", "ours, compiled"
JAX_BY_HAND, JAX_SCAN = "jax by hand", "jax by hand, scan"
JAX_EAGER, JAX_FUSED, JAX_RUN = "ours on jax, documented step", "ours on jax, make_train_step", "ours on jax, step.run"


def bars_of_many(timings: Timings) -> list[Bar]:
    """Bounds for many models; those on contestants that did not take part are left out."""
    by_hand = timings.fastest([name for name in BY_HAND if name in timings.seconds])
    bars = [
        Bar(f"{FUSED} / {by_hand}", timings.ratio(FUSED, by_hand), 1.1, at_least=False),
        Bar(f"{COMPILED} / by hand, compiled", timings.ratio(COMPILED, "by hand, compiled"), 1.1, at_least=False),
    ]
    if PEER in timings.seconds:
        bars += [
            Bar(f"{PEER} / {EAGER}", timings.ratio(PEER, EAGER), 1.6, at_least=True),
            Bar(f"{PEER} / {COMPILED}", timings.ratio(PEER, COMPILED), 4.0, at_least=True),
        ]
    return bars


def bars_of_one(timings: Timings) -> list[Bar]:
    """Bounds for a single model, against plain PyTorch."""
    return [
        Bar(f"one model: {FUSED} / plain PyTorch", timings.ratio(FUSED, "loop"), 1.15, at_least=False),
        Bar(f"one model: {EAGER} / plain PyTorch", timings.ratio(EAGER, "loop"), 1.4, at_least=False),
    ]


def bars_of_jax(timings: Timings) -> list[Bar]:
    """Bounds for many models on JAX; those on a peer that did not take part are left out."""
    bars = [
        Bar(f"{JAX_FUSED} / {JAX_BY_HAND}", timings.ratio(JAX_FUSED, JAX_BY_HAND), 1.1, at_least=False),
        Bar(f"{JAX_RUN} / {JAX_SCAN}", timings.ratio(JAX_RUN, JAX_SCAN), 1.1, at_least=False),
    ]
    if PEER in timings.seconds:
        limits = {JAX_EAGER: 1.5, JAX_FUSED: 4.5, JAX_RUN: 6.0}
        bars += [
            Bar(f"{PEER} / {ours}", timings.ratio(PEER, ours), limit, at_least=True) for ours, limit in limits.items()
        ]
    return bars


def bars_of_cnns(timings: Timings) -> list[Bar]:
    """Bounds for convolutions: JAX, with the form of convolution that it chooses, against PyTorch."""
    return [Bar(f"{JAX_FUSED} / {FUSED}", timings.ratio(JAX_FUSED, FUSED), 1.5, at_least=False)]


def bars_of_memory(memory: Mapping[str, Memory]) -> list[Bar]:
    """One copy of the parameters beyond gradients and optimizer state, and a tenth for all the rest."""
    return [
        Bar(f"memory beyond gradients and optimizer state / parameters: {name}", Spread.of([m.copies] * 2), 1.1, False)
        for name, m in memory.items()
        if name.startswith("ours")
    ]
