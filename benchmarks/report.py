"""Results as Markdown to read and as JSON to keep."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import PEER, Bar
from benchmarks.measure import Memory, Spread
from benchmarks.results import Results

# In a process of its own: JAX would hold on to the GPU's memory.
_GPU_OF_JAX = "import jax; print(jax.devices()[0].device_kind if jax.default_backend() == 'gpu' else '')"


def gpu() -> str | None:
    """The GPU that PyTorch and JAX both use by default, by name; None without one."""
    if not torch.cuda.is_available():
        return None
    finished = subprocess.run([sys.executable, "-c", _GPU_OF_JAX], capture_output=True, text=True, check=True)
    return finished.stdout.strip() or None


def machine(threads: int, gpu: str | None) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        **({} if gpu is None else {"gpu": gpu}),
        "processor": _processor(),
        "cores": cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jax": importlib.metadata.version("jax"),
        "load_average_before": os.getloadavg()[0],
    }


def cores() -> int:
    """How many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    # platform.processor() is empty on many Linux systems.
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_quartiles(spread: Spread, unit: float = 1.0) -> str:
    return f"{spread.median / unit:.2f} ({spread.lower / unit:.2f}-{spread.upper / unit:.2f})"


def timings_table(race: str, results: Results) -> str:
    """Times of a step, how many times as fast as loop and peer a contestant is, and its distance from the floor."""
    timings = results.timings[race]
    references = [name for name in ("loop", PEER) if name in timings.seconds]
    header = [
        "contestant",
        "ms a step",
        "x floor",
        *(f"x as fast as {name}" for name in references),
        f"first {timings.num_first_steps} steps, s",
    ]
    rows = [
        [
            name,
            _with_quartiles(timings.spread(name), 1e-3),
            f"{results.over_floor(race, name).median:.1f}",
            *(_with_quartiles(timings.ratio(reference, name)) for reference in references),
            f"{timings.first_steps[name]:.2f}",
        ]
        for name in timings.seconds
    ]
    return table(header, rows)


def floor_line(race: str, results: Results) -> str:
    """What the floor of a race is made of."""
    floor, rates = results.floors[race], results.rates
    return (
        f"Floor: {floor.seconds * 1e3:.3f} ms, the larger of {floor.flops / 1e6:.0f} Mflop at {rates.flops / 1e9:.0f} "
        f"Gflop/s ({floor.flops / rates.flops * 1e3:.3f} ms) and {floor.bytes / 1e6:.1f} MB at {rates.bytes / 1e9:.1f} "
        f"GB/s ({floor.bytes / rates.bytes * 1e3:.3f} ms)."
    )


def memory_table(memory: Mapping[str, Memory]) -> str:
    """Peak memory and its parts in MB."""
    header = ["contestant", "peak, MB", "gradients", "optimizer state", "rest", "rest / parameters"]
    rows = [
        [
            name,
            *(f"{size / 1e6:.0f}" for size in (m.peak, m.gradients, m.optimizer_state, m.rest)),
            f"{m.copies:.2f}",
        ]
        for name, m in memory.items()
    ]
    return table(header, rows)


def bars_table(bars: Sequence[Bar]) -> str:
    """Each bound, what was measured and whether it holds."""
    header = ["what", "measured", "bound", "holds"]
    rows = [
        [
            bar.what,
            _with_quartiles(bar.measured),
            f"{'at least' if bar.at_least else 'at most'} {bar.limit:g}",
            "yes" if bar.holds else "**no**",
        ]
        for bar in bars
    ]
    return table(header, rows)


def as_json(where: Mapping[str, Any], results: Results, bars: Sequence[Bar]) -> dict[str, Any]:
    """Everything that was measured, round by round."""
    return {
        "machine": dict(where),
        "rates": asdict(results.rates),
        "timings": {
            key: {
                **asdict(one),
                "float64_weight_difference": results.differences[key],
                "floor": asdict(results.floors[key]),
            }
            for key, one in results.timings.items()
        },
        "memory": {name: asdict(one) for name, one in results.memory.items()},
        "bars": [{**asdict(bar), "holds": bar.holds} for bar in bars],
    }
