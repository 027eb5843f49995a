"""``results.csv`` of a grid search: what varied, what became of each experiment, and its metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigurationError
from trainers.config.files import write_atomically
from trainers.config.grid import ParameterGrid
from trainers.config.keys import canonical_key
from trainers.config.result_table import FoundExperiment, Row, as_csv
from trainers.config.schema import ExperimentConfig
from trainers.searches.executors import Job, Outcome, read_record

_LOGGER = logging.getLogger(__name__)

RESULTS_FILE = "results.csv"
# The whole file is written anew, which must not become the work of a search of thousands.
_SECONDS_BETWEEN = 2.0
# States of experiments with an error that say more than that they failed.
_NOT_COMPLETE = ("INTERRUPTED", "CANCELLED")


class ResultsFile:
    """The table of a search on disk, up to date as experiments end.

    Args:
        path: The file; None for a search without results, which writes none.
        jobs: All experiments of the search, those too that are not run now.
        grids: Whose keys are shown.
    """

    def __init__(self, path: Path | None, jobs: Sequence[Job], grids: Sequence[ParameterGrid]) -> None:
        self._path = path
        # Two spellings of a field are one column, called as the first grid calls it.
        keys: dict[str, str] = {}
        for grid in grids:
            for given in grid.parameters:
                keys.setdefault(canonical_key(given), given)
        self._keys = keys
        self._jobs = list(jobs)
        self._outcomes: dict[int, Outcome] = {}
        self._rows: dict[int, Row] = {}
        self._written = -_SECONDS_BETWEEN

    def note(self, outcome: Outcome) -> None:
        """Take in what became of an experiment, and write the file unless that was done just now.

        Args:
            outcome: Of the experiment.
        """
        self._outcomes[outcome.job.index] = outcome
        self._rows.pop(outcome.job.index, None)
        if time.monotonic() - self._written >= _SECONDS_BETWEEN:
            self._write()

    def end(self) -> list[FoundExperiment]:
        """Write the file as it stays; returns all experiments of the search."""
        # Of those without an outcome this process has stopped some since they were looked at.
        self._rows = {index: row for index, row in self._rows.items() if index in self._outcomes}
        self._write()
        return [self._found(job) for job in self._jobs]

    def _found(self, job: Job) -> FoundExperiment:
        outcome, state = self._outcomes.get(job.index), _recorded_state(job)
        error = None if outcome is None else outcome.error
        if outcome is None:
            state = state or "NOT RUN"
        elif error is None:
            state = state or (outcome.job_id if outcome.job_id == "DRY_RUN" else "SUBMITTED")
        elif state not in _NOT_COMPLETE:
            state = "FAILED"
        parameters = {given: _value_at(job.config, key) for key, given in self._keys.items()}
        return FoundExperiment(job.name, job.folder, parameters, state, error)

    def _write(self) -> None:
        """Write the file; where that fails, which ends no search, the log says so."""
        if self._path is None:
            return
        for job in self._jobs:
            if job.index not in self._rows:
                self._rows[job.index] = self._found(job).row()
        try:
            write_atomically(self._path, as_csv([self._rows[job.index] for job in self._jobs]))
        except OSError as error:
            _LOGGER.warning("%s cannot be written: %s", self._path, error)
        self._written = time.monotonic()


def _value_at(config: ExperimentConfig, key: str) -> Any:
    """The value at a canonical key; None where a section or an entry is not there."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value


def _recorded_state(job: Job) -> str | None:
    try:
        state = (read_record(job.folder) or {}).get("state")
    except (ConfigurationError, OSError):
        return None  # a script may do with its folder what it likes
    return state if isinstance(state, str) else None
