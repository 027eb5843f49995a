"""How fast a step could be on this machine: arithmetic at the rate of a large product, memory at that of a copy."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import Workload

SIDE = 1024
COPIED_BYTES = 256 * 2**20
REPEATS = 15


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second, with the threads that contestants have.

    Attributes:
        flops: Operations of a product of two float32 matrices of 1024 rows and columns; a multiplication and an
            addition are two.
        bytes: Bytes read and bytes written in a copy of 256 MiB.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Floor:
    """The least a step of a workload takes.

    Attributes:
        flops: Operations of the products and convolutions, forward and backward, of all models.
        bytes: Parameters and optimizer state, each read once and written once.
        seconds: The larger of both times.
    """

    flops: float
    bytes: float
    seconds: float


def measure_rates(threads: int) -> Rates:
    """The best of some repetitions, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply_async(_rates, (threads,)).get(timeout=300)


def _rates(threads: int) -> Rates:
    torch.set_num_threads(threads)
    one, other, product = (torch.randn(SIDE, SIDE) for _ in range(3))
    source = torch.zeros(COPIED_BYTES // 4)
    target = torch.ones_like(source)
    return Rates(
        2 * SIDE**3 / _shortest(lambda: torch.mm(one, other, out=product)),
        2 * COPIED_BYTES / _shortest(lambda: target.copy_(source)),
    )


def _shortest(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def floor_of(workload: Workload, rates: Rates) -> Floor:
    """The floor of one step of all models."""
    # Written out, because operations that PyTorch has as one, LSTMs say, are not counted.
    model = workload.written_out()
    inputs = torch.empty(workload.batch, *workload.input_shape, device="meta")
    targets = torch.empty(workload.batch, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(inputs), targets).backward()
    flops = workload.num_models * counter.get_total_flops()
    moved = 2 * (1 + workload.recipe.state_copies) * workload.parameter_bytes
    return Floor(flops, moved, max(flops / rates.flops, moved / rates.bytes))
