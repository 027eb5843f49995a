"""What a benchmark has measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.floors import Floor, Rates
from benchmarks.measure import Memory, Spread, Timings


@dataclass(frozen=True)
class Results:
    """What a benchmark has measured.

    Attributes:
        timings: Of the races, by name.
        differences: The largest difference in float64 between the contestants of each race.
        rates: What the machine does in a second.
        floors: The least that a step of each race takes.
        memory: Of those contestants whose memory was measured.
    """

    timings: dict[str, Timings]
    differences: dict[str, float]
    rates: Rates
    floors: dict[str, Floor]
    memory: dict[str, Memory]

    def over_floor(self, race: str, contestant: str, *, flops_only: bool = False) -> Spread:
        """Time of a contestant's steps, divided by the floor of the race."""
        floor = self.floors[race]
        least = floor.flops / self.rates.flops if flops_only else floor.seconds
        return Spread.of([seconds / least for seconds in self.timings[race].seconds[contestant]])
