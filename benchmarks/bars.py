"""What must hold: bounds on ratios of times and of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.measure import Memory, Spread, Timings
from benchmarks.results import Results


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


BY_HAND = ["by hand, one optimizer", "by hand, one fused optimizer", "by hand, rate per model"]
PEER = "modelbatch 0.1.0"
# Contestants from PyPI, and what is installed for them.
PEERS = {PEER: "modelbatch", "torchmb 0.2": "torchmb"}
EAGER, FUSED, COMPILED = "ours, documented step", "ours, make_train_step", "ours, compiled"
JAX_BY_HAND, JAX_SCAN = "jax by hand", "jax by hand, scan"
TRAINED, TRAINED_BATCH = "GenericTrainer", "GenericTrainer of a batch"
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
    step = timings.fastest([name for name in (FUSED, COMPILED) if name in timings.seconds])
    return [
        Bar(f"one model: {step} / plain PyTorch", timings.ratio(step, "loop"), 1.15, at_least=False),
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


def bars_of_trainer(results: Results) -> list[Bar]:
    """Bounds on what the trainer adds to a step, against the same steps in a loop written by hand."""
    pairs = {"one": (TRAINED, "loop"), "many": (TRAINED_BATCH, FUSED)}
    return [
        Bar(f"{trained} / {hand}", results.timings[race].ratio(trained, hand), 1.05, at_least=False)
        for race, (trained, hand) in pairs.items()
    ]


OURS = [EAGER, FUSED, COMPILED, JAX_EAGER, JAX_FUSED, JAX_RUN]


def bars_of_comparison(results: Results) -> list[Bar]:
    """Bounds for models of each kind; those on contestants that did not take part are left out."""
    bars = []
    for race, timings in results.timings.items():
        own = bars_of_one(timings) if timings.workload.num_models == 1 else [bar_of_the_best(timings)]
        bars += [_named(race, bar) for bar in own]
    many = results.timings["MLP, 64"]
    by_hand = many.fastest([name for name in BY_HAND if name in many.seconds])
    same_path = {FUSED: by_hand, COMPILED: "by hand, compiled", JAX_FUSED: JAX_BY_HAND, JAX_RUN: JAX_SCAN}
    bars += [
        Bar(f"MLP, 64: {ours} / {hand}", many.ratio(ours, hand), 1.1, at_least=False)
        for ours, hand in same_path.items()
    ]
    to_floor = results.over_floor("MLP, 64", JAX_RUN, flops_only=True)
    bars.append(Bar(f"MLP, 64: {JAX_RUN} / floor of operations", to_floor, 2.0, at_least=False))
    bars += [
        Bar(f"{race}: {reference} / {ours}", timings.ratio(reference, ours), limit, at_least=True)
        for race, reference, candidates, limit in _LEAST
        if reference in (timings := results.timings[race]).seconds
        for ours in [timings.fastest(candidates)]
    ]
    return [*bars, _bar_of_growth(many, results.timings["MLP, 1024"])]


# How many times as fast as a reference the fastest of some contestants must be.
_LEAST: list[tuple[str, str, list[str], float]] = [
    ("MLP, 64", PEER, [COMPILED], 4.5),
    ("MLP, 64", PEER, [JAX_FUSED], 5.0),
    ("MLP, 64", PEER, [JAX_RUN], 8.0),
    ("MLP, 256", PEER, OURS, 6.0),
    ("CNN, 64", "loop", OURS, 2.5),
    ("CNN, 64", PEER, OURS, 1.6),
    ("BatchNorm CNN, 64", "loop", OURS, 2.0),
    ("transformer, 32", "loop", OURS, 1.3),
]


def bar_of_the_best(timings: Timings) -> Bar:
    """Never slower than the fastest of the others by more than 5 %."""
    ours = timings.fastest([name for name in OURS if name in timings.seconds])
    theirs = timings.fastest([name for name in timings.seconds if name not in OURS])
    return Bar(f"{ours} / {theirs}, the best of the others", timings.ratio(ours, theirs), 1.05, at_least=False)


def _bar_of_growth(fewer: Timings, more: Timings) -> Bar:
    """Time per model of the fastest path, with more models than it could keep in the caches."""
    ours = more.fastest(OURS)
    counts = fewer.workload.num_models, more.workload.num_models
    pairs = zip(more.seconds[ours], fewer.seconds[ours], strict=True)
    ratios = Spread.of([(after / counts[1]) / (before / counts[0]) for after, before in pairs])
    return Bar(f"{ours}: time per model with {counts[1]} models / with {counts[0]}", ratios, 1.3, at_least=False)


def _named(race: str, bar: Bar) -> Bar:
    return replace(bar, what=f"{race}: {bar.what}")


def bars_of_memory(memory: Mapping[str, Memory]) -> list[Bar]:
    """One copy of the parameters beyond gradients and optimizer state, and a tenth for all the rest."""
    return [
        Bar(f"memory beyond gradients and optimizer state / parameters: {name}", Spread.of([m.copies] * 2), 1.1, False)
        for name, m in memory.items()
        if name in (EAGER, FUSED, COMPILED)
    ]
