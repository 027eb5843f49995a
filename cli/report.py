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
from cli.comparison import ACCURACY_TOLERANCE, WEIGHT_TOLERANCE, Comparison
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

    def __init__(
        self, total: int, unit: str, console: Console, bar: tuple[Progress, TaskID] | None
    ) -> None:
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
        _print(self._console, f"{text}  ({self._rate():,.0f} {self._unit}/s, {left:.0f} s left)")

    def _rate(self) -> float:
        return self._done / (time.perf_counter() - self._started)


@contextmanager
def stage(console: Console, title: str, total: int, unit: str) -> Iterator[Stage]:
    """Show the progress of a task of `total` units."""
    if not console.is_terminal:
        _print(console, title)
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


def print_comparison(console: Console, num_models: int, history: History, comparison: Comparison) -> None:
    """Print the two times, and whether both ways came to the same result."""
    at_once = sum(history.seconds)
    compared = len(comparison.models)
    part = "" if compared == num_models else f" (measured on {compared}, extrapolated)"
    _print(
        console,
        f"{num_models} models one after another: {comparison.loop_seconds:.1f} s{part}, "
        f"at once: {at_once:.1f} s ({comparison.loop_seconds / at_once:.1f} times as fast)",
        style="bold",
    )
    compiling = compile_seconds(history)
    if compiling is not None:
        _print(
            console,
            f"Of the {at_once:.1f} s about {compiling:.1f} s went into torch.compile, once; without them "
            f"{comparison.loop_seconds / (at_once - compiling):.1f} times as fast.",
        )
    _print(
        console,
        f"Same computation: after {comparison.checked_steps} steps in float64 the weights of {compared} models "
        f"differ by at most {comparison.weight_difference:.1e} (tolerance {WEIGHT_TOLERANCE:.0e}).",
    )
    if not comparison.weights_agree:
        _print(console, "WARNING: that is beyond the tolerance; please report it.", style="bold red")
    differences = comparison.accuracy_differences
    worst = int(differences.argmax())
    _print(
        console,
        f"Final validation accuracies, in float32 after the whole training, differ by at most "
        f"{100 * differences[worst]:.2f} points (model {comparison.models[worst]}) and by "
        f"{100 * differences.mean():.2f} on average (tolerance {100 * ACCURACY_TOLERANCE:.0f}).",
    )
    if not comparison.accuracies_agree:
        _print(console, "WARNING: that is beyond the tolerance; please report it.", style="bold red")
