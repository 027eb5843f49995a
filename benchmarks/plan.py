"""What a benchmark consists of; each is a module with a function that plans it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bars import Bar
from benchmarks.measure import Race
from benchmarks.results import Results
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Choices:
    """What is left to the caller.

    Attributes:
        quick: Whether this is a smoke run: small models, few steps, no bounds.
        full: Whether races without bounds are run as well, where a benchmark has such.
        device: Where to train.
        left_out: Contestants that do not take part.
    """

    quick: bool = False
    full: bool = False
    device: str = "cpu"
    left_out: tuple[str, ...] = ()

    def present(self, contestants: list[str]) -> list[str]:
        """Those that take part."""
        return [name for name in contestants if name not in self.left_out]


@dataclass(frozen=True)
class Plan:
    """One benchmark.

    Attributes:
        title: Of its page.
        races: By name.
        bars: What must hold, given what was measured.
        measured_memory: Whose memory is measured.
        large: What they train meanwhile.
        draw: Writes a figure of the results to a file.
    """

    title: str
    races: Mapping[str, Race]
    bars: Callable[[Results], list[Bar]]
    measured_memory: tuple[str, ...] = ()
    large: Workload | None = None
    draw: Callable[[Results, Path], None] | None = None
