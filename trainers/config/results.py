"""What a grid search was asked to do, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.grid import ParameterGrid
from trainers.config.modes import sign_of
from trainers.config.naming import NamingStrategy
from trainers.config.result_plot import plot_curves
from trainers.config.result_table import FoundExperiment, best_row

if TYPE_CHECKING:
    from trainers.config.schema import ExperimentConfig


class ExecutionMode(Enum):
    """Where experiments run.

    Attributes:
        LOCAL: On this machine, one process each; returns when all have ended.
        SLURM: As batch jobs; returns at once.
        DRY_RUN: Nowhere: configurations and commands are written.

    Example:
        >>> ExecutionMode("dry_run")
        <ExecutionMode.DRY_RUN: 'dry_run'>
    """

    LOCAL = "local"
    SLURM = "slurm"
    DRY_RUN = "dry_run"


@dataclass
class GridSearchConfig:
    """What a grid search was asked to do.

    Attributes:
        name: What it is called.
        description: What it is for.
        base_config: What all experiments share.
        parameter_grids: The grids, one after another.
        naming_strategy: How experiments are called.
        max_concurrent_jobs: How many may run at once; None leaves it to the execution mode.
        execution_mode: Where they run.
        output_dir: Folder of everything that is written.

    Example:
        >>> GridSearchConfig(name="rates").naming_strategy.value
        'hash_based'
    """

    name: str
    description: str = ""
    base_config: dict[str, Any] = field(default_factory=dict)
    parameter_grids: list[ParameterGrid] = field(default_factory=list)
    naming_strategy: NamingStrategy = NamingStrategy.HASH_BASED
    max_concurrent_jobs: int | None = None
    execution_mode: ExecutionMode = ExecutionMode.SLURM
    output_dir: Path | None = None


@dataclass(repr=False)
class GridSearchResult:
    """What became of the experiments of one call, and what the whole search has found.

    Attributes:
        grid_config: What was asked for.
        total_experiments: How many experiments the call had to do with.
        generated_experiments: Their configurations.
        submitted_jobs: Job ids of those that were submitted or, run locally, succeeded; ``DRY_RUN`` for a dry run.
        failed_submissions: Name and error of the others.
        execution_time: Seconds that the call took.
        output_directory: Where everything was written.
        experiments: All of the search, those too that an earlier call has run; `table` shows them.

    Example:
        >>> result = GridSearchResult(
        ...     GridSearchConfig("rates"), 4, submitted_jobs=["1", "2", "3"], failed_submissions=[("d", "exit code 1")]
        ... )
        >>> result
        <GridSearchResult 'rates': 3 of 4 experiments submitted or complete, 1 failed; output in None>
    """

    grid_config: GridSearchConfig
    total_experiments: int
    generated_experiments: list[ExperimentConfig] = field(default_factory=list)
    submitted_jobs: list[str] = field(default_factory=list)
    failed_submissions: list[tuple[str, str]] = field(default_factory=list)
    execution_time: float = 0.0
    output_directory: Path | None = None
    experiments: list[FoundExperiment] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"<GridSearchResult {self.grid_config.name!r}: {len(self.submitted_jobs)} of {self.total_experiments} "
            f"experiments submitted or complete, {len(self.failed_submissions)} failed; "
            f"output in {self.output_directory}>"
        )

    @property
    def success_rate(self) -> float:
        """Submitted experiments as a fraction of all; 1.0 where there was nothing to do."""
        return len(self.submitted_jobs) / self.total_experiments if self.total_experiments else 1.0

    def get_summary(self) -> dict[str, Any]:
        """Return names, counts and times as plain values.

        Returns:
            ``grid_name``, ``total_experiments``, ``successful_submissions``, ``failed_submissions``,
            ``success_rate``, ``execution_time_sec`` and ``output_directory``.
        """
        return {
            "grid_name": self.grid_config.name,
            "total_experiments": self.total_experiments,
            "successful_submissions": len(self.submitted_jobs),
            "failed_submissions": len(self.failed_submissions),
            "success_rate": self.success_rate,
            "execution_time_sec": self.execution_time,
            "output_directory": None if self.output_directory is None else str(self.output_directory),
        }

    def table(self, best: str | None = None, mode: str = "min") -> list[dict[str, Any]]:
        """Return one row per experiment of the search: its name, what became of it, what varied, and its metrics.

        Metrics are read from ``metrics.csv`` in the experiment's folder whenever this is called. Packs write that file,
        and so does a script whose trainer has ``logging.csv_log_dir`` set to its ``--output-dir``.

        Args:
            best: A metric: values of the epoch where it is best are shown, and ``best_epoch``. Default: the last ones.
            mode: ``"min"`` or ``"max"`` of ``best``.

        Returns:
            Rows in the order of the search, with the keys ``name``, ``state``, ``epochs``, those of the grids, those of
            the metrics, and ``error`` where something went wrong. A key that is already taken is preceded by
            ``parameters.`` or ``metrics.``.

        Raises:
            ConfigurationError: There is no such mode.

        Example:
            >>> GridSearchResult(GridSearchConfig("rates"), 0).table()
            []
        """
        sign_of(mode)
        return [experiment.row(best, mode) for experiment in self.experiments]

    def best(self, metric: str = "val_loss", mode: str = "min", *, any_epoch: bool = False) -> dict[str, Any]:
        """Return the row of the complete experiment with the best value of a metric.

        Args:
            metric: To compare by.
            mode: ``"min"`` or ``"max"``.
            any_epoch: Whether the best epoch of each experiment counts; its metrics are shown then. Default: the last.

        Returns:
            The row, as in `table`.

        Raises:
            ConfigurationError: There is no such mode, or no complete experiment has a finite value of the metric.

        Example:
            ``result.best("val_accuracy", mode="max")["name"]`` is the name of the best experiment.
        """
        return best_row(self.experiments, metric, mode, any_epoch=any_epoch)

    def plot(self, path: str | Path, metric: str = "val_loss", mode: str = "min") -> None:
        """Write a metric over epochs as a picture: a line per experiment, the best ones named.

        Args:
            path: The file; its suffix says which format, such as ``.png`` or ``.svg``.
            metric: To be shown.
            mode: ``"min"`` or ``"max"``: which last values are the best.

        Raises:
            ConfigurationError: There is no such mode, or no experiment has a value of the metric.
            ImportError: matplotlib is not installed.
        """
        plot_curves(Path(path), f"{self.grid_config.name}: {metric}", self.experiments, metric, mode)
