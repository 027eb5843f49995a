"""What the demo prints while it runs and at its end, and its results.json."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import mb_torch
from cli.comparison import ACCURACY_TOLERANCE, NUDGES, WEIGHT_TOLERANCE, Comparison
from cli.grid import Grid
from cli.training import History

TABLE_ROWS = 10


class Stage:
    """Progress of one long task: a bar in a terminal, plain lines elsewhere.

    Args:
        total: How many units of work there are.
        unit: What one is called, in the plural.
        console: Where plain lines go.
        bar: The bar and its task; None for plain lines.
    """

    def __init__(self, total: int, unit: str, console: Console, bar: tuple[Progress, TaskID] | None) -> None:
        self._total = total
        self._unit = unit
        self._console = console
        self._bar = bar
        self._done = 0
        self._started = time.perf_counter()

    def advance(self) -> None:
        """Count one unit of work as done."""
        self._done += 1
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, advance=1, rate=f"{self._rate():,.0f} {self._unit}/s")

    def say(self, text: str) -> None:
        """Show text beside the bar, or on a line with rate and remaining time."""
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, text=text)
            return
        left = (self._total - self._done) / self._rate()
        print_line(self._console, f"{text}  ({self._rate():,.0f} {self._unit}/s, {left:.0f} s left)")

    def _rate(self) -> float:
        return self._done / (time.perf_counter() - self._started)


@contextmanager
def stage(console: Console, title: str, total: int, unit: str) -> Iterator[Stage]:
    """Show the progress of a task of `total` units."""
    if not console.is_terminal:
        print_line(console, title)
        yield Stage(total, unit, console, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task(title, total=total, rate="", text="")
        yield Stage(total, unit, console, (progress, task))


def rank(history: History) -> list[int]:
    """Return model numbers, best final validation accuracy first, then lowest loss; a NaN loss comes last."""
    accuracies, losses = history.validation_accuracy[-1].tolist(), history.validation_loss[-1].tolist()
    return sorted(range(len(losses)), key=lambda i: (-accuracies[i], math.inf if math.isnan(losses[i]) else losses[i]))


def print_best(console: Console, grid: Grid, history: History) -> None:
    """Print a table of the best models."""
    ranking = rank(history)[:TABLE_ROWS]
    table = Table(title=f"The best {len(ranking)} of {grid.num_models} models" if len(ranking) > 1 else "The model")
    for heading in ("rank", "model", "learning rate", "weight decay", "validation accuracy", "validation loss"):
        table.add_column(heading, justify="right")
    for place, index in enumerate(ranking, start=1):
        config = grid.configs[index]
        table.add_row(
            str(place),
            str(index),
            short(config["lr"]),
            short(config["weight_decay"]),
            f"{history.validation_accuracy[-1][index]:.2%}",
            f"{history.validation_loss[-1][index]:.4f}",
        )
    console.print(table)


def print_comparison(console: Console, grid: Grid, history: History, comparison: Comparison, *, compiled: bool) -> None:
    """Print the two times, and whether both ways came to the same result."""
    at_once, loop = history.total_seconds, comparison.loop_seconds
    compared = len(comparison.models)
    measured = compared == grid.num_models
    origin = "" if measured else f" extrapolated from {counted(compared, 'model')}"
    print_line(
        console,
        f"{counted(grid.num_models, 'model')} one after another: {loop:.1f} s{origin}, at once: {at_once:.1f} s "
        f"({loop / at_once:.2g} times{'' if measured else ', extrapolated'})",
        style="bold",
    )
    if compiled and history.start_up_seconds is not None:
        compiling = history.start_up_seconds
        print_line(
            console,
            f"About {compiling:.1f} s of the {at_once:.1f} s went into torch.compile, once: "
            f"{loop / (at_once - compiling):.1f} times without.",
        )
    print_line(
        console,
        f"Same computation? After {comparison.checked_steps} steps in float64 the weights of "
        f"{counted(comparison.checked_models, 'model')} "
        f"differ by at most {comparison.weight_difference:.1e}; tolerance {WEIGHT_TOLERANCE:.0e}.",
    )
    if not comparison.weights_agree:
        warn(console, "that is beyond the tolerance; please report it")
    worst = comparison.most_different
    print_line(
        console,
        f"After the whole training in float32, validation accuracies of {comparison.num_accuracies_agree} of "
        f"{compared} agree within {100 * ACCURACY_TOLERANCE:g} points. Largest difference: "
        f"{100 * comparison.accuracy_differences.max():.2f} points (model {worst}, learning rate "
        f"{short(grid.configs[worst]['lr'])}).",
    )
    if comparison.rounding_effect is not None:
        print_line(
            console,
            f"Unstable training amplifies rounding: model {worst} trained alone from weights one rounding step apart "
            f"ends up to {100 * comparison.rounding_effect:.2f} points apart (in {NUDGES} trials).",
        )
    if not comparison.accuracies_agree:
        warn(console, "less than half of the accuracies agree; please report it")


def write_results(
    path: Path,
    settings: dict[str, Any],
    inputs: dict[str, float],
    grid: Grid,
    seeds: Sequence[int],
    history: History,
    comparison: Comparison | None,
) -> None:
    """Write everything that was run and measured as JSON; numbers that are not finite become null.

    Args:
        path: The file; replaced whole or not at all.
        settings: The options of the run.
        inputs: What was subtracted from all pixels, and what they were then divided by.
        grid: Hyper-parameters of the models.
        seeds: Seeds of their initial weights.
        history: What was measured after each epoch.
        comparison: With training one after another; None if left out.
    """
    ranks = {index: place for place, index in enumerate(rank(history), start=1)}
    curves = {
        "train_loss": torch.stack(history.train_loss, 1).tolist(),
        "validation_loss": torch.stack(history.validation_loss, 1).tolist(),
        "validation_accuracy": torch.stack(history.validation_accuracy, 1).tolist(),
    }
    results = {
        "settings": settings,
        "inputs": inputs,
        "versions": {
            "modelbatch-hybrid": mb_torch.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "learning_rates": grid.learning_rates,
        "weight_decays": grid.weight_decays,
        "seconds": {"at_once": history.total_seconds, "each_epoch": history.seconds},
        "comparison": None if comparison is None else _comparison_record(comparison),
        "models": [
            {
                "model": index,
                "rank": ranks[index],
                "learning_rate": config["lr"],
                "weight_decay": config["weight_decay"],
                "seed": seed,
                "weights": f"weights/model_{index}.pt",
                **{name: curve[index][-1] for name, curve in curves.items()},
                "epochs": {name: curve[index] for name, curve in curves.items()},
            }
            for index, (config, seed) in enumerate(zip(grid.configs, seeds, strict=True))
        ],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(_finite(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _comparison_record(comparison: Comparison) -> dict[str, Any]:
    return {
        "models": comparison.models,
        "measured_seconds": comparison.measured_seconds,
        "one_after_another_seconds": comparison.loop_seconds,
        "extrapolated": comparison.loop_seconds != comparison.measured_seconds,
        "float64_models": comparison.checked_models,
        "float64_steps": comparison.checked_steps,
        "float64_weight_difference": comparison.weight_difference,
        "float64_weight_tolerance": WEIGHT_TOLERANCE,
        "validation_accuracy_differences": comparison.accuracy_differences.tolist(),
        "validation_accuracy_tolerance": ACCURACY_TOLERANCE,
        "rounding_effect": comparison.rounding_effect,
    }


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: float) -> str:
    """Write a hyper-parameter with two digits.

    Example:
        >>> short(0.003162), short(3.162e-05), short(1.0)
        ('0.0032', '3.2e-5', '1')
    """
    return f"{value:.2g}".replace("e-0", "e-")


def counted(number: int, what: str) -> str:
    """Write a number of things.

    Example:
        >>> counted(1, "model"), counted(1438, "image")
        ('1 model', '1,438 images')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print one paragraph as it is: no markup, and no line breaks that would tear paths apart."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Print a warning that cannot be overlooked."""
    print_line(console, f"WARNING: {text}.", style="bold red")
