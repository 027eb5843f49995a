"""The comparison as a figure: time against the number of models, and how many times as fast as a loop."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bars import BY_HAND, COMPILED, FUSED, JAX_FUSED, JAX_RUN, JAX_SCAN, OURS, PEER
from benchmarks.measure import Timings
from benchmarks.results import Results

# Contestants that are drawn as lines, with their colour and style; ours are the solid ones.
LINES = {
    "loop": ("black", ":"),
    PEER: ("tab:red", "--"),
    BY_HAND[-1]: ("tab:blue", "--"),
    "by hand, compiled": ("tab:cyan", "--"),
    JAX_SCAN: ("tab:purple", "--"),
    FUSED: ("tab:blue", "-"),
    COMPILED: ("tab:cyan", "-"),
    JAX_FUSED: ("tab:green", "-"),
    JAX_RUN: ("tab:purple", "-"),
}


def draw(results: Results, path: Path) -> None:
    """Write the figure to a file; its suffix says of which kind.

    Args:
        results: Of the comparison.
        path: Where to.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    growing, compared = figure.subplots(1, 2)
    _draw_growth(growing, [timings for race, timings in results.timings.items() if _is_of(race, "MLP")])
    _draw_speed(compared, {r: t for r, t in results.timings.items() if t.workload.num_models > 1})
    figure.savefig(path, metadata={"Date": None})


def _is_of(race: str, kind: str) -> bool:
    return race.split(", ")[0] == kind and race.split(", ")[-1].isdigit()


def _draw_growth(axes: Axes, races: list[Timings]) -> None:
    for contestant, (colour, style) in LINES.items():
        points = [
            (timings.workload.num_models, timings.spread(contestant).median / timings.workload.num_models * 1e6)
            for timings in races
            if contestant in timings.seconds
        ]
        if len(points) > 1:
            axes.plot(*zip(*sorted(points), strict=True), style, color=colour, marker=".", label=contestant)
    axes.set(xscale="log", yscale="log", xlabel="models", ylabel="microseconds a step and model", title="MLPs")
    if axes.lines:
        axes.legend(fontsize="x-small")


def _draw_speed(axes: Axes, races: dict[str, Timings]) -> None:
    groups = {"the best of ours": True, "the best of the others": False}
    height = 0.8 / len(groups)
    for place, (label, ours) in enumerate(groups.items()):
        widths = []
        for timings in races.values():
            names = [name for name in timings.seconds if (name in OURS) is ours and name != "loop"]
            widths.append(timings.ratio("loop", timings.fastest(names)).median)
        rows = [row + place * height for row in range(len(races))]
        axes.barh(rows, widths, height, label=label)
    axes.set_yticks([row + height / 2 for row in range(len(races))], list(races))
    axes.axvline(1, color="black", linestyle=":")
    axes.set(xlabel="times as fast as one model after another", title="kind, number of models")
    axes.invert_yaxis()
    axes.legend(fontsize="x-small")
