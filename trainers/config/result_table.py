"""What a grid search found: a row for every experiment, from the metrics in its folder."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigurationError, problem
from trainers.config.modes import sign_of

_LOGGER = logging.getLogger(__name__)

METRICS_FILE = "metrics.csv"
# Of that file, as `CsvLogger` writes it.
METRICS_COLUMNS = ["step", "epoch", "name", "value"]
# Before the names of values of single steps, which a trainer logs between those of epochs.
_OF_STEPS = "step_"
# What metrics and parameters cannot be called in a table.
_OWN_COLUMNS = ("name", "state", "epochs", "best_epoch", "error")

# By metric and epoch.
Metrics = dict[str, dict[int, float]]
Row = dict[str, Any]


@dataclass(frozen=True)
class FoundExperiment:
    """One experiment of a grid search, as its table shows it.

    Attributes:
        name: Its name.
        folder: Where its metrics are.
        parameters: Its values of the keys of the grids.
        state: What became of it, such as ``"COMPLETED"`` or ``"FAILED"``.
        error: What went wrong; None if nothing did.
    """

    name: str
    folder: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    state: str = "COMPLETED"
    error: str | None = None

    def metrics(self) -> Metrics:
        """Return the values of every epoch by metric, as far as they are written; those of single steps are not."""
        # A trainer that knows the experiment's name logs into a folder of that name.
        for folder in (self.folder, self.folder / self.name):
            path = folder / METRICS_FILE
            try:
                return _metrics_in(path, list(whole_rows(path)))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, csv.Error) as error:
                _LOGGER.warning("%s cannot be read: %s. Its metrics are left out.", path, error)
                return {}
        return {}

    def row(self, best: str | None = None, mode: str = "min") -> Row:
        """Return the experiment's row.

        Args:
            best: A metric: those of the epoch where it is best are shown. Default: the last value of each.
            mode: ``"min"`` or ``"max"``.
        """
        return _row(self, self.metrics(), best, mode)


def best_row(experiments: Sequence[FoundExperiment], metric: str, mode: str, *, any_epoch: bool) -> Row:
    """Return the row of the complete experiment with the best value of a metric; of equals the first.

    Args:
        experiments: To choose from.
        metric: To compare by.
        mode: ``"min"`` or ``"max"``.
        any_epoch: Whether the best epoch of each counts instead of the last.

    Raises:
        ConfigurationError: There is no such mode, or no complete experiment has a finite value.
    """
    sign = sign_of(mode)
    complete = [one for one in experiments if one.state == "COMPLETED"]
    found, known = [], set[str]()
    for one in complete:
        metrics = one.metrics()
        known |= metrics.keys()
        if metric in metrics:
            values = list(metrics[metric].values()) if any_epoch else [last_value(metrics[metric])]
            finite = [sign * value for value in values if math.isfinite(value)]
            found += [(min(finite), one, metrics)] if finite else []
    if not found:
        expected = f"one with a finite value in a complete experiment; there are {sorted(known)}"
        if not known:
            expected = (
                f"metrics in {METRICS_FILE} of an experiment's folder, but none of the {len(complete)} complete "
                f"experiments (of {len(experiments)}) has any; table() says what became of each"
            )
        raise ConfigurationError(problem("metric", metric, expected))
    # Its metrics are not read again: they may have changed since.
    _, chosen, metrics = min(found, key=lambda entry: entry[0])
    return _row(chosen, metrics, metric if any_epoch else None, mode)


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as the text of a CSV file: a column for every key of any row, ``error`` last.

    Args:
        rows: From `FoundExperiment.row`.

    Example:
        >>> print(as_csv([{"name": "a", "seed": 1}, {"name": "b", "error": "no luck"}]), end="")
        name,seed,error
        a,1,
        b,,no luck
    """
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "error"))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*columns, "error"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def last_value(values: Mapping[int, float]) -> float:
    """Return the value of the last epoch.

    Args:
        values: By epoch, at least one.

    Example:
        >>> last_value({0: 0.5, 1: 0.25})
        0.25
    """
    return values[max(values)]


def whole_rows(path: Path) -> Iterator[list[str]]:
    """Return the rows of a CSV file that were written to their end.

    Args:
        path: Of the file. What follows its last newline is left out: a process was killed there, or the machine
            failed, and half of a number is a number too.

    Raises:
        OSError: It cannot be read.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    return csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))


def _metrics_in(path: Path, rows: list[list[str]]) -> Metrics:
    if rows and rows[0] != METRICS_COLUMNS:
        _LOGGER.warning(
            "%s: received the columns %s; expected %s. Its metrics are left out.", path, rows[0], METRICS_COLUMNS
        )
        return {}
    metrics: Metrics = {}
    for row in rows[1:]:
        try:
            _, given, name, value = row
            epoch, number = int(given), float(value)
        except ValueError:
            continue  # what a machine that failed has left
        metrics.setdefault(name, {})[epoch] = number
    if all(name.startswith(_OF_STEPS) for name in metrics):
        return {}  # no epoch has ended yet
    # An epoch has the values of its steps under their own names; without, the prefix belongs to the name.
    return {
        name: values
        for name, values in metrics.items()
        if not (name.startswith(_OF_STEPS) and name.removeprefix(_OF_STEPS) in metrics)
    }


def _row(one: FoundExperiment, metrics: Metrics, best: str | None, mode: str) -> Row:
    epochs = max((epoch + 1 for values in metrics.values() for epoch in values), default=0)
    row: Row = {"name": one.name, "state": one.state, "epochs": epochs}
    for key, value in one.parameters.items():
        row[f"parameters.{key}" if key in _OWN_COLUMNS else key] = value
    if best is None:
        shown = {metric: last_value(values) for metric, values in metrics.items()}
    else:
        epoch = _best_epoch(metrics.get(best, {}), mode)
        row["best_epoch"] = epoch
        shown = {metric: values[epoch] for metric, values in metrics.items() if epoch in values}
    for metric, value in shown.items():
        row[f"metrics.{metric}" if metric in row or metric in _OWN_COLUMNS else metric] = value
    return row if one.error is None else {**row, "error": one.error}


def _best_epoch(values: Mapping[int, float], mode: str) -> int | None:
    sign = sign_of(mode)
    finite = {epoch: sign * value for epoch, value in values.items() if math.isfinite(value)}
    return min(finite, key=lambda epoch: finite[epoch], default=None)


def _cell(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else value
