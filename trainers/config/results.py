"""What a grid search was asked to do, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.grid import ParameterGrid
from trainers.config.naming import NamingStrategy

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


@dataclass
class GridSearchResult:
    """What became of the experiments of one call.

    Attributes:
        grid_config: What was asked for.
        total_experiments: How many experiments the call had to do with.
        generated_experiments: Their configurations.
        submitted_jobs: Job ids of those that were submitted or, run locally, succeeded; ``DRY_RUN`` for a dry run.
        failed_submissions: Name and error of the others.
        execution_time: Seconds that the call took.
        output_directory: Where everything was written.

    Example:
        >>> result = GridSearchResult(
        ...     GridSearchConfig("rates"), 4, submitted_jobs=["1", "2", "3"], failed_submissions=[("d", "exit code 1")]
        ... )
        >>> result.success_rate
        0.75
    """

    grid_config: GridSearchConfig
    total_experiments: int
    generated_experiments: list[ExperimentConfig] = field(default_factory=list)
    submitted_jobs: list[str] = field(default_factory=list)
    failed_submissions: list[tuple[str, str]] = field(default_factory=list)
    execution_time: float = 0.0
    output_directory: Path | None = None

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
