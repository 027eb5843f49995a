"""Where metrics go: CSV files, TensorBoard, Weights & Biases; and where the trainer's messages go.

A resumed run continues its own files and runs. What was logged after the checkpoint it resumes from is taken out of
the CSV file, and hidden in TensorBoard; both show what they would if the run had never been stopped. Weights & Biases
takes nothing back: it stays there, and wandb leaves out what is logged again for the same steps.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from mb_torch import MissingPackage
from trainers.config.result_table import METRICS_COLUMNS, METRICS_FILE, whole_rows
from trainers.config.schema import LoggingConfig
from trainers.errors import TrainerError
from trainers.utils.logging import DEFAULT_FORMAT

_LOGGER = logging.getLogger(__name__)

_PLACES = ("csv_log_dir", "tensorboard_dir", "log_file")


class MetricLogger(Protocol):
    """Takes numbers; one per place they go to.

    Attributes:
        name: Under which its state is saved.
    """

    name: str

    def log(self, values: Mapping[str, float], epoch: int, step: int) -> None:
        """Write values by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to continue, as plain data."""

    def close(self) -> None:
        """Write everything out."""


class CsvLogger:
    """One row per value in ``metrics.csv``: step, epoch, name, value.

    Args:
        folder: Of the file; made if it does not exist.
        rows: Of the file that the run had written at the checkpoint that is resumed; later ones are removed. None for
            a file that begins anew: one that is there is moved to ``metrics.1.csv``, or the next free number.

    Raises:
        TrainerError: The file cannot be written.
    """

    name = "csv"

    def __init__(self, folder: Path, rows: int | None = None) -> None:
        self._path = folder / METRICS_FILE
        # A file of its own first: a run that is killed here keeps what it had.
        temporary = self._path.with_name(f".{self._path.name}.{uuid4().hex}.tmp")
        with _named(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            kept = _first_rows(self._path, rows) if rows and self._path.is_file() else []
            try:
                with temporary.open("x", newline="", encoding="utf-8") as stream:
                    csv.writer(stream).writerows([METRICS_COLUMNS, *kept])
                if rows is None and self._path.exists():
                    _move_aside(self._path)
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
        self._rows = len(kept)

    def log(self, values: Mapping[str, float], epoch: int, step: int) -> None:
        """See `MetricLogger`."""
        # Not kept open: a process may write the files of more experiments than it may have files open.
        with _named(self._path), self._path.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([step, epoch, name, repr(value)] for name, value in values.items())
        self._rows += len(values)

    def state_dict(self) -> dict[str, Any]:
        """See `MetricLogger`."""
        return {"rows": self._rows}

    def close(self) -> None:
        """Nothing is left to be written."""


class TensorBoardLogger:
    """Scalars for TensorBoard.

    Args:
        folder: Of the event files.
        resumed_at: Optimizer steps done at the checkpoint that is resumed; None for a new run.
        saved: The logger's state in that checkpoint. TensorBoard then hides what was logged from that step on, and
            what the state has of the step itself is logged again. Without it, as in checkpoints of earlier versions,
            what was logged after that step is hidden.

    Raises:
        MissingPackage: tensorboard is not installed.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, resumed_at: int | None, saved: Mapping[str, Any] | None = None) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        # TensorBoard hides whole steps, and the logs of an epoch are of the same step as its last checkpoint.
        hidden_from = resumed_at + 1 if resumed_at is not None and not saved else resumed_at
        self._writer = module.SummaryWriter(str(folder), purge_step=hidden_from)
        self._step = resumed_at
        self._of_step: list[list[Any]] = []
        if saved and saved["step"] == resumed_at:
            self._add(saved["values"])

    def log(self, values: Mapping[str, float], epoch: int, step: int) -> None:
        """See `MetricLogger`."""
        if step != self._step:
            self._step, self._of_step = step, []
        self._add([[name, value] for name, value in values.items()] + [["epoch", epoch]])

    def state_dict(self) -> dict[str, Any]:
        """See `MetricLogger`."""
        return {"step": self._step, "values": list(self._of_step)}

    def close(self) -> None:
        """See `MetricLogger`."""
        self._writer.close()

    def _add(self, values: list[list[Any]]) -> None:
        for name, value in values:
            self._writer.add_scalar(name, value, self._step)
        self._of_step += values


class WandbLogger:
    """A run of Weights & Biases, continued under its id.

    Args:
        config: Project, entity, notes and tags.
        run_name: Name of the run; None lets wandb choose.
        settings: Of the trainer, shown with the run.
        run_id: Of the run to continue; None begins one.

    Raises:
        MissingPackage: wandb is not installed.
    """

    name = "wandb"

    def __init__(
        self, config: LoggingConfig, run_name: str | None, settings: Mapping[str, Any], run_id: str | None
    ) -> None:
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            notes=config.wandb_notes,
            tags=list(config.wandb_tags),
            name=run_name,
            config=dict(settings),
            id=run_id,
            resume="allow",
        )

    def log(self, values: Mapping[str, float], epoch: int, step: int) -> None:
        """See `MetricLogger`."""
        self._run.log({**values, "epoch": epoch}, step=step)

    def state_dict(self) -> dict[str, Any]:
        """See `MetricLogger`."""
        return {"run_id": self._run.id}

    def close(self) -> None:
        """See `MetricLogger`."""
        self._run.finish()


def absolute_places(config: LoggingConfig) -> dict[str, str]:
    """Return the absolute paths of what is logged to, by the paths as configured.

    Args:
        config: Of the logging.

    Example:
        >>> absolute_places(LoggingConfig(csv_log_dir="/logs/.", log_file="/logs/messages"))
        {'/logs/.': '/logs', '/logs/messages': '/logs/messages'}
    """
    paths = [getattr(config, name) for name in _PLACES]
    return {path: os.path.abspath(os.path.expanduser(path)) for path in paths if path is not None}


def at_places(config: LoggingConfig, places: Mapping[str, str]) -> LoggingConfig:
    """Return a configuration with other paths, and all else as it is.

    Args:
        config: Of the logging; it stays as it is.
        places: From `absolute_places`; a path that is not among them stays.
    """
    paths = {name: getattr(config, name) for name in _PLACES}
    return dataclasses.replace(config, **{name: places.get(path, path) for name, path in paths.items()})


def make_loggers(
    config: LoggingConfig,
    run_name: str | None,
    settings: Mapping[str, Any],
    trackers: Mapping[str, Any] | None = None,
    resumed_at: int | None = None,
) -> list[MetricLogger]:
    """Make the loggers that a configuration asks for.

    Args:
        config: Of the logging.
        run_name: Of the experiment: a folder below the configured ones; None for these themselves.
        settings: Of the trainer, for trackers that show them.
        trackers: States by logger name from the checkpoint that is resumed.
        resumed_at: Optimizer steps done at that checkpoint; None for a new run.

    Returns:
        The loggers.

    Raises:
        MissingPackage: One needs a package that is not installed.

    Example:
        >>> make_loggers(LoggingConfig(), None, {})
        []
    """
    loggers: list[MetricLogger] = []
    below = run_name or ""
    states = trackers or {}
    if config.csv_log_dir is not None:
        loggers.append(CsvLogger(_folder(config.csv_log_dir, below), states.get("csv", {}).get("rows")))
    if config.tensorboard_dir is not None:
        loggers.append(TensorBoardLogger(_folder(config.tensorboard_dir, below), resumed_at, states.get("tensorboard")))
    if config.use_wandb:
        loggers.append(WandbLogger(config, run_name, settings, states.get("wandb", {}).get("run_id")))
    return loggers


@contextlib.contextmanager
def messages_as_configured(config: LoggingConfig) -> Iterator[None]:
    """Send the trainers' messages where the configuration says, for as long as the context lasts.

    Args:
        config: Level, file, and whether they go to the console. Handlers that the program itself has set up get
            the messages in any case, so a console handler is added only where there is none.

    Raises:
        TrainerError: There is no such level.
    """
    logger = logging.getLogger("trainers")
    level = logging.getLevelNamesMapping().get(config.log_level.upper())
    if level is None:
        raise TrainerError(
            "logging.log_level", received=repr(config.log_level), expected="DEBUG, INFO, WARNING, ERROR or CRITICAL"
        )
    handlers: list[logging.Handler] = []
    if config.console_log and not logger.hasHandlers():
        handlers.append(logging.StreamHandler())
    if config.log_file is not None:
        path = os.path.expanduser(config.log_file)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        handlers.append(_LogFile(path, encoding="utf-8"))
    before = logger.level
    logger.setLevel(level)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(DEFAULT_FORMAT))
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """Messages in a file; that it cannot be written any more does not end a run, and is said once."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            self._warn(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self.has_failed:
            self.has_failed = True
            warnings.warn(f"{self.baseFilename}: messages are lost, because {error}", stacklevel=2)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file cannot be written: errors of a full disk do not."""
    try:
        yield
    except OSError as error:
        raise TrainerError(
            f"{path} cannot be written: {error.strerror or error}", fix="Make room, or choose another folder."
        ) from error


def _move_aside(path: Path) -> None:
    """Keep an earlier run's file, or the user's own."""
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    free = next(candidate for candidate in numbered if not candidate.exists())
    path.rename(free)
    _LOGGER.info("%s was there already and is %s now", path, free.name)


def _folder(path: str, below: str) -> Path:
    # Absolute: what a program does in a run may change its working directory.
    return Path(os.path.abspath(os.path.expanduser(path)), below)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"the configuration asks for {package}, which is not installed",
            fix="pip install 'modelbatch-hybrid[tracking]', or switch it off in the logging section.",
        ) from error


def _first_rows(path: Path, count: int) -> list[list[str]]:
    # What follows the rows may be of a machine that failed: broken bytes.
    return list(itertools.islice(whole_rows(path), 1, count + 1))
