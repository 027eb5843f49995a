"""What a benchmark has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.floors import Floor, Rates
from benchmarks.measure import Memory, Race, Spread, Timings


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

    def take_over(self, path: Path, races: Mapping[str, Race], where: Mapping[str, Any], rounds: int) -> None:
        """Take the races that an interrupted run has written, where machine, versions and workload are the same.

        Args:
            path: The data that it wrote; nothing happens if there is none.
            races: Those to be run.
            where: The machine.
            rounds: How many rounds are wanted.
        """
        if not path.is_file():
            return
        saved = json.loads(path.read_text())
        if any(saved["machine"].get(key) != value for key, value in where.items() if key != "load_average_before"):
            return
        for name, own in saved["timings"].items():
            race = races.get(name)
            if race is None or own["workload"] != json.loads(json.dumps(asdict(race.workload))):
                continue
            if any(len(seconds) != rounds for seconds in own["seconds"].values()):
                continue
            if list(own["seconds"]) == race.contestants:
                self.differences[name] = own["float64_weight_difference"]
                timed = own["num_first_steps"], own["first_steps"], own["seconds"], own["loss_difference"]
                self.timings[name] = Timings(race.workload, *timed)
