"""A picture of what a grid search found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from trainers.config.errors import ConfigurationError, problem
from trainers.config.modes import sign_of
from trainers.config.result_table import FoundExperiment, last_value

# More names than these would hide the curves.
_NAMED = 5
_OTHERS = "#b0b0b0"


def plot_curves(path: Path, title: str, experiments: Sequence[FoundExperiment], metric: str, mode: str) -> None:
    """Write a metric over epochs: a line per experiment, the best ones in front, coloured and named.

    Args:
        path: The file.
        title: Above the plot.
        experiments: To be shown.
        metric: Of the experiments.
        mode: ``"min"`` or ``"max"``: which last values are the best.

    Raises:
        ConfigurationError: There is no such mode, or no experiment has a value of the metric.
        ImportError: matplotlib is not installed.
    """
    sign = sign_of(mode)
    metrics = {one.name: one.metrics() for one in experiments}
    curves = {name: own[metric] for name, own in metrics.items() if metric in own}
    if not curves:
        known = sorted({key for own in metrics.values() for key in own})
        raise ConfigurationError(problem("metric", metric, f"one that an experiment has; there are {known}"))
    try:
        # A Figure needs neither a display nor global state.
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "a plot needs the package matplotlib. Run: pip install 'modelbatch-hybrid[demo]'", name="matplotlib"
        ) from error
    last = {name: sign * last_value(values) for name, values in curves.items()}
    best_first = sorted(curves, key=lambda name: last[name] if math.isfinite(last[name]) else math.inf)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for rank, name in reversed(list(enumerate(best_first))):
        is_named = rank < _NAMED
        axes.plot(
            [epoch + 1 for epoch in sorted(curves[name])],
            [curves[name][epoch] for epoch in sorted(curves[name])],
            color=f"C{rank}" if is_named else _OTHERS,
            linewidth=2 if is_named else 1,
            marker="o" if len(curves[name]) == 1 else None,
            label=f"{sign * last[name]:.4g}  {name}" if is_named else None,
        )
    axes.set(title=title, xlabel="epoch", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(reverse=True, title="best last values")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
