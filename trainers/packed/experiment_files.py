"""What each experiment of a pack has in its own folder: its metrics and its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.callbacks import TrainingCallback
from trainers.checkpoints.files import to_plain
from trainers.checkpoints.slices import model_content
from trainers.checkpoints.store import CheckpointStore
from trainers.config.schema import ExperimentConfig
from trainers.population import BestModels, History
from trainers.reporting.loggers import CsvLogger
from trainers.settings import GenericTrainerConfig

if TYPE_CHECKING:
    from trainers.generic import GenericTrainer


class ExperimentFiles(TrainingCallback):
    """Writes ``metrics.csv`` of every experiment while the pack trains, and its checkpoints at the end.

    Of an experiment that stops before the others the checkpoint has weights, moments and metrics of its own end; only
    its learning rate and schedule are those of the pack's end.

    Args:
        folders: Of the experiments, by name.
        configs: Of the experiments, by name.
        history: Of the population whose models the experiments are.
        best_models: Their best weights; None if they are not kept.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        configs: Mapping[str, ExperimentConfig],
        history: History,
        best_models: BestModels | None,
    ) -> None:
        self._folders = folders
        self._configs = configs
        self._history = history
        self._best_models = best_models
        self._loggers: dict[str, CsvLogger] = {}
        # Of an earlier process: rows of the files.
        self._rows: dict[str, int] = {}
        # Of experiments that were stopped before the others: epoch and optimizer steps.
        self._ends: dict[str, tuple[int, int]] = {}

    def on_training_start(self, trainer: GenericTrainer) -> None:
        """Begin the files; of those of an earlier process what the checkpoint knows of is kept."""
        for name in self._history.models:
            self._loggers[name] = CsvLogger(self._folders[name], self._rows.get(name, 0))
        # One that is trained again, because its patience was raised since, ends later.
        stopped = {self._history.models[place] for place in trainer.stopped_models}
        self._ends = {name: end for name, end in self._ends.items() if name in stopped}

    def on_epoch_end(self, trainer: GenericTrainer, epoch: int, logs: dict[str, Any]) -> None:
        """Write the metrics of the epoch."""
        for name, logger in self._loggers.items():
            logger.log(self._history.at(name, epoch), epoch, trainer.global_step)
        for place in trainer.stopped_models:
            self._ends.setdefault(self._history.models[place], (epoch, trainer.global_step))

    def export(self, name: str, content: Mapping[str, Any]) -> None:
        """Write an experiment's own checkpoints, as a trainer of one module would have written them.

        Args:
            name: Of the experiment.
            content: Of the pack's newest checkpoint.
        """
        config = self._configs[name]
        settings = config.checkpoint
        store = CheckpointStore(
            _checkpoints_in(self._folders[name], settings.checkpoint_dir),
            filename=settings.filename,
            keep=settings.save_top_k,
            monitor=settings.monitor,
            mode=settings.mode,
        )
        last = {
            **model_content(content, self._history.models.index(name)),
            "experiment_name": name,
            "config": to_plain(GenericTrainerConfig.from_experiment_config(config).to_dict(), "config"),
            # The pack's: they speak of the other experiments.
            "callbacks": [],
            "trackers": {},
        }
        if name in self._ends:
            last = self._at(last, name, *self._ends[name])
        best = None if self._best_models is None else self._best_models.bests.get(name)
        with store.held():
            if best is not None:
                # Optimizer and schedule are kept of the end only.
                left_out = {"optimizer_state_dict": None, "scheduler_state_dict": None}
                weights = {"model_state_dict": dict(best.state), **left_out}
                _save(store, {**self._at(last, name, best.epoch, best.step), **weights}, settings.timeout_seconds)
            _save(store, last, settings.timeout_seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return how much is in the files, and which experiments have ended, as plain data."""
        rows = self._rows | {name: logger.state_dict()["rows"] for name, logger in self._loggers.items()}
        return {"by_model": {name: {"rows": own, "end": self._ends.get(name)} for name, own in rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        by_model = state["by_model"]
        self._rows = {name: own["rows"] for name, own in by_model.items()}
        self._ends = {name: own["end"] for name, own in by_model.items() if own["end"] is not None}

    def _at(self, content: Mapping[str, Any], name: str, epoch: int, step: int) -> dict[str, Any]:
        """The content as of the end of an earlier epoch."""
        place = {"epoch": epoch, "global_step": step}
        state = {**content["resume_state"], **place, "train": None, "val": None}
        return {**content, **place, "metrics": self._history.at(name, epoch), "resume_state": state}


def _checkpoints_in(folder: Path, given: str) -> Path:
    """Where an experiment's checkpoints go: of a folder outside its own, which is for all, into a part."""
    path = folder / given
    # Links are not followed: a folder of one's own may well be a link to a larger disk.
    is_own = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))
    return path if is_own else path / folder.name


def _save(store: CheckpointStore, content: dict[str, Any], seconds: float) -> None:
    store.save(
        store.name_for(content["epoch"], content["global_step"], content["metrics"]),
        content,
        # Otherwise the metrics are those of an epoch before.
        is_ranked=content["resume_state"]["train"] is None,
        seconds=seconds,
    )
