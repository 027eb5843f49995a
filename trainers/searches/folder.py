"""What is in the output folder of a grid search, and who may write to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from trainers.config.creation import create_experiment_config
from trainers.config.errors import ConfigurationError
from trainers.config.files import read_tree, write_atomically, written
from trainers.config.manager import ConfigurationManager
from trainers.config.naming import NamingStrategy
from trainers.config.results import GridSearchResult
from trainers.config.search import ParameterGridSearch
from trainers.folder_lock import lock
from trainers.searches.executors import Job, Plan, read_record, settled_folders

GRID_FILE = "grid_config.json"
SUMMARY_FILE = "execution_summary.json"
LOCK_FILE = ".lock"


class GridFolder:
    """The folder of a grid search: ``grid_config.json``, ``execution_summary.json`` and a folder an experiment.

    Args:
        path: The folder, absolute; it need not exist.
        manager: Reads and writes configurations.

    Attributes:
        path: As given.
    """

    def __init__(self, path: Path, manager: ConfigurationManager) -> None:
        self.path = path
        self._manager = manager

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Hold the folder, made if it is missing, for this process and for children that inherit the descriptor.

        The system frees it when the last of them has ended, in whatever way. On Windows, and on file systems without
        locks, nothing is locked.

        Yields:
            The file descriptor.

        Raises:
            ConfigurationError: The folder cannot be made or written to, or another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"output_dir: nothing can be written to {self.path} ({error}); expected a folder, which need not exist"
            ) from error
        try:
            if not lock(descriptor):
                raise ConfigurationError(
                    f"output_dir: {self.path} is in use by another grid search, or by experiments that outlived "
                    "theirs. Wait for them, or use another output_dir."
                )
            yield descriptor
        finally:
            # Closed, not unlocked: unlocking would take the folder from the children as well.
            os.close(descriptor)

    def moment_of_earlier_search(self, naming_strategy: NamingStrategy) -> datetime | None:
        """Return when the search that is in the folder was made.

        Args:
            naming_strategy: The strategy to be used now.

        Returns:
            None if it is not known and names do not contain it.

        Raises:
            ConfigurationError: There is no search, or its experiments are named in another way.
        """
        earlier = self._read(GRID_FILE).get("naming_strategy")
        if earlier != naming_strategy.value:
            raise ConfigurationError(
                f"naming_strategy: received {naming_strategy.value!r}; expected {earlier!r}, by which the experiments "
                f"in {self.path} are named"
            )
        is_needed = naming_strategy is NamingStrategy.TIMESTAMP_BASED
        if not is_needed and not (self.path / SUMMARY_FILE).exists():
            return None
        moment = self._read(SUMMARY_FILE).get("search_made")
        try:
            return datetime.fromisoformat(str(moment))
        except ValueError as error:
            raise ConfigurationError(
                f"{self.path / SUMMARY_FILE}: search_made: received {moment!r}; expected a date and time"
            ) from error

    def refuse_other_configurations(self, jobs: Sequence[Job]) -> None:
        """Raise if one of the experiments has been run here with another configuration.

        Args:
            jobs: The experiments.

        Raises:
            ConfigurationError: Running it would mix what was written then with what would be written now.
        """
        for job in jobs:
            if read_record(job.folder) is None or not job.config_path.exists():
                continue
            if create_experiment_config(self._manager.load_config(job.config_path, validate=False)) != job.config:
                raise ConfigurationError(
                    f"output_dir: {job.folder} holds the results of another configuration under the same name. "
                    "Use another output_dir, or move these results away."
                )

    def unsettled(self, jobs: Sequence[Job]) -> tuple[Job, ...]:
        """Return those of the experiments that are neither complete nor at work.

        Args:
            jobs: The experiments.
        """
        settled = settled_folders([job.folder for job in jobs])
        return tuple(job for job in jobs if job.folder not in settled)

    def write_plan(self, search: ParameterGridSearch, plan: Plan) -> None:
        """Write the search, the configurations of the experiments, and what their packs are to run.

        Args:
            search: The search.
            plan: Its experiments.
        """
        search.save_grid_config(self.path / GRID_FILE)
        for job in plan.jobs:
            self._manager.save_config(job.config, job.config_path)
        for path, content in plan.pack_contents().items():
            write_atomically(path, written(content, "json"))

    def write_summary(self, result: GridSearchResult, moment: datetime) -> None:
        """Write what became of the experiments.

        Args:
            result: What became of them.
            moment: When the search was made.
        """
        summary = {
            **result.get_summary(),
            "execution_mode": result.grid_config.execution_mode.value,
            "search_made": moment.isoformat(timespec="microseconds"),
            "experiments": [config.experiment_name for config in result.generated_experiments],
            "submitted_jobs": result.submitted_jobs,
            "failures": dict(result.failed_submissions),
        }
        write_atomically(self.path / SUMMARY_FILE, written(summary, "json"))

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return read_tree(path, path.read_bytes())
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"rerun_failed_only: there is no {name} in {self.path}; expected the folder of an earlier grid search"
            ) from error
