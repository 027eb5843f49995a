"""Contestants are first checked against each other, then timed in turns, then asked for their memory."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.worker import Weights, Worker
from benchmarks.workloads import Workload

Progress = Callable[[str], None]

CHECKED_STEPS = 5
WEIGHT_TOLERANCE = 1e-9
# In float32 rounding differs and grows with the steps: these bounds are ten times what right contestants differ by, of
# CNNs seven times.
LOSS_ABSOLUTE, LOSS_RELATIVE = 2e-3, 2e-2
# A model with a high learning rate doubles any difference again and again; after so many steps only the mean over the
# models says something.
COMPARED_STEPS = 300


class Disagreement(AssertionError):
    """Contestants do not compute the same thing, so comparing their times says nothing."""


def check_weights(weights: Mapping[str, Weights]) -> float:
    """Return the largest difference between any contestant's weights and the first one's.

    Raises:
        Disagreement: It exceeds 1e-9, or the contestants have different models or parameters.
    """
    (first, expected), *others = weights.items()
    largest = 0.0
    for name, found in others:
        if [sorted(model) for model in found] != [sorted(model) for model in expected]:
            raise Disagreement(f"{name} and {first} have different parameters")
        for index, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
            for key, value in ours.items():
                difference = _largest_difference(theirs[key], value)
                # Written so that NaN fails.
                if not difference <= WEIGHT_TOLERANCE:
                    raise Disagreement(f"{name}: {key} of model {index} is {difference:.1e} off from {first}")
                largest = max(largest, difference)
    return largest


def check_losses(losses: Mapping[str, npt.NDArray[np.float64]]) -> float:
    """Return the largest difference between any contestant's loss curves `[steps, num_models]` and the first one's.

    Raises:
        Disagreement: It is more than rounding in float32 explains, or the losses did not fall.
    """
    (first, expected), *others = losses.items()
    if not expected[-1].mean() < expected[0].mean():
        raise Disagreement(f"{first}: the losses do not fall")
    largest = 0.0
    for name, found in others:
        if found.shape != expected.shape:
            raise Disagreement(f"{name}: losses {found.shape}, {first}: {expected.shape}")
        within = _within(found, expected)
        later = slice(COMPARED_STEPS, None)
        if found.shape[1] == 1:
            # Of a single model there is no mean: its later losses only have to be numbers.
            within[later] = np.isfinite(found[later])
        else:
            within[later] = _within(found.mean(1, keepdims=True), expected.mean(1, keepdims=True))[later]
        if not within.all():
            step, model = (int(i) for i in np.argwhere(~within)[0])
            raise Disagreement(
                f"{name}: loss {found[step, model]:.6f} of model {model} at step {step}; "
                f"{first} has {expected[step, model]:.6f}"
            )
        largest = max(largest, _largest_difference(found, expected))
    return largest


def _within(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    close: npt.NDArray[np.bool_] = abs(found - expected) <= LOSS_ABSOLUTE + LOSS_RELATIVE * abs(expected)
    return close


def _largest_difference(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(abs(one - other).max()) if one.shape == other.shape else float("inf")


def agree_in_float64(contestants: Sequence[str], workload: Workload, threads: int) -> float:
    """Train every contestant for five steps in float64 and return the largest difference in weights.

    Raises:
        Disagreement: See `check_weights`.
    """
    start = workload.models()[0]
    weights: dict[str, Weights] = {}
    for name in contestants:
        with Worker(name, threads) as worker:
            worker.build(replace(workload, dtype="float64"))
            worker.run(CHECKED_STEPS)
            weights[name] = worker.weights()
    trained = weights[contestants[0]][0]
    moved = max(
        _largest_difference(trained[key], p.detach().cpu().double().numpy()) for key, p in start.named_parameters()
    )
    if not moved > 1e-6:
        raise Disagreement(f"{contestants[0]}: the weights did not move")
    return check_weights(weights)


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles and extremes."""

    median: float
    lower: float
    upper: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, min(values), max(values))


@dataclass(frozen=True)
class Timings:
    """What one race gave.

    Attributes:
        workload: What was trained.
        num_first_steps: How many steps of each contestant are its first.
        first_steps: Seconds of these, which hold compilation and other set-up.
        seconds: Seconds a step, for each contestant one entry a round.
        loss_difference: By how much loss curves differed at most.
    """

    workload: Workload
    num_first_steps: int
    first_steps: dict[str, float]
    seconds: dict[str, list[float]]
    loss_difference: float

    def spread(self, contestant: str) -> Spread:
        """Seconds a step."""
        return Spread.of(self.seconds[contestant])

    def ratio(self, of: str, to: str) -> Spread:
        """Time of one contestant divided by another's, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[of], self.seconds[to], strict=True)])

    def fastest(self, contestants: Sequence[str]) -> str:
        """The contestant with the smallest median."""
        return min(contestants, key=lambda name: self.spread(name).median)


@dataclass(frozen=True)
class Race:
    """Who trains what, and for how many steps. Contestants that make `TOGETHER` steps at once need multiples of it.

    Attributes:
        contestants: Keys of `CONTESTANTS`.
        workload: What to train.
        steps: Timed steps of a contestant in a round.
        warm_up: Steps before them, to warm caches.
        first_steps: Steps before the first round, timed apart.
    """

    contestants: list[str]
    workload: Workload
    steps: int
    warm_up: int
    first_steps: int = 5

    def shortened(self) -> Race:
        """As little as runs at all."""
        return replace(self, steps=2, warm_up=2, first_steps=2)


def race(plan: Race, threads: int, *, rounds: int, say: Progress) -> Timings:
    """Time contestants in turns: every round has each of them once, in a new order.

    Args:
        plan: Who trains what.
        threads: Threads of each worker.
        rounds: How many rounds.
        say: Gets a line now and then.

    Raises:
        Disagreement: The loss curves differ.
    """
    shuffle = random.Random(0).shuffle
    first_steps: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in plan.contestants}
    with ExitStack() as stack:
        workers = {}
        for name in plan.contestants:
            workers[name] = stack.enter_context(Worker(name, threads))
            workers[name].build(plan.workload)
            first_steps[name] = workers[name].run(plan.first_steps)
            say(f"{name}: first {plan.first_steps} steps in {first_steps[name]:.2f} s")
        order = list(plan.contestants)
        for number in range(1, rounds + 1):
            shuffle(order)
            for name in order:
                workers[name].run(plan.warm_up)
                seconds[name].append(workers[name].run(plan.steps) / plan.steps)
            if number % 5 == 0:
                say(f"round {number} of {rounds}")
        difference = check_losses({name: worker.losses() for name, worker in workers.items()})
    return Timings(plan.workload, plan.first_steps, first_steps, seconds, difference)


@dataclass(frozen=True)
class Memory:
    """Peak memory of training, in bytes, beyond that of a process that has trained two such models."""

    workload: Workload
    peak: int

    @property
    def gradients(self) -> int:
        """One number a parameter."""
        return self.workload.parameter_bytes

    @property
    def optimizer_state(self) -> int:
        """Adam's two running averages."""
        return 2 * self.workload.parameter_bytes

    @property
    def rest(self) -> int:
        """What is left for parameters, activations and temporaries."""
        return self.peak - self.gradients - self.optimizer_state

    @property
    def copies(self) -> float:
        """The rest, in copies of the parameters."""
        return self.rest / self.workload.parameter_bytes


def peak_memory(contestant: str, workload: Workload, threads: int, steps: int = 4) -> Memory:
    """Measure the memory that a contestant needs to be built and trained for some steps."""
    with Worker(contestant, threads) as worker:
        # Code and work space of the libraries, which any program has: first use, at the same widths.
        worker.build(replace(workload, num_models=2))
        # After a library may have decided otherwise for the process.
        worker.return_freed_memory()
        worker.run(steps)
        worker.discard()
        before = worker.present_memory()
        worker.build(workload)
        worker.run(steps)
        return Memory(workload, worker.peak_memory() - before)
