"""What is made of a run's metrics: logs, schedules, early stopping, reports."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainers.errors import TrainerError
from trainers.ranks import of_first_rank
from trainers.reporting.metrics import MetricSums, epoch_logs, required
from trainers.schedules import StoppedGroups, step_schedulers
from trainers.states import TrainerPhase

if TYPE_CHECKING:
    from trainers.generic import GenericTrainer
    from trainers.loop import TrainingLoop

_LOGGER = logging.getLogger(__name__)


class Results:
    """The metrics of a run.

    Args:
        trainer: That trains.
        loop: Its run, with schedulers, loggers and early stopping.
    """

    def __init__(self, trainer: GenericTrainer, loop: TrainingLoop) -> None:
        self.trainer = trainer
        self._loop = loop
        self._steps_in_this_process = 0
        self._stopped_groups = StoppedGroups(trainer.optimizer)

    def of_epoch(self, train: MetricSums, validation: MetricSums) -> dict[str, Any]:
        """Join an epoch's metrics; those of single models become the trainer's ``model_metrics``.

        Args:
            train: Of the training batches.
            validation: Of the validation batches; empty without validation.

        Returns:
            The epoch's logs: those of the first rank on all ranks, so that whatever is decided by them is decided
            alike, before and after a resume.
        """
        logs = epoch_logs(train.means(), validation.means())
        model_metrics = epoch_logs(train.model_means(), validation.model_means())
        logs, self.trainer.model_metrics = of_first_rank((logs, model_metrics))
        for key, values in self.trainer.model_metrics.items():
            logs.update({f"{key}_model_{model}": value for model, value in enumerate(values)})
        return logs

    def act_on(self, logs: dict[str, Any], *, has_all: bool) -> None:
        """Step schedulers and stop models by an epoch's logs.

        Args:
            logs: From `of_epoch`.
            has_all: Whether metrics of the validation can be expected, if there ever is one.

        Raises:
            TrainerError: A setting names a metric that is not there.
        """
        trainer, config = self.trainer, self.trainer.config
        if config.scheduler_interval == "epoch" and self._loop.schedulers:
            trainer.set_phase(TrainerPhase.SCHEDULER_EPOCH_STEP)
            self._step_schedulers(logs if has_all else None)
        if self._loop.early_stopping.is_on and has_all:
            self._stop_early(logs)
        if config.monitor is not None and has_all:
            required(logs, config.monitor, "checkpoint.monitor")

    def count_step(self) -> None:
        """Step the schedulers after an optimizer step, if they are stepped then."""
        if self.trainer.config.scheduler_interval == "step" and self._loop.schedulers:
            self.trainer.set_phase(TrainerPhase.SCHEDULER_BATCH_STEP)
            self._step_schedulers(None)
        self._steps_in_this_process += 1

    def report(self, logs: Mapping[str, Any]) -> None:
        """Send an epoch's logs where they go.

        Args:
            logs: Of the epoch.
        """
        self._log(logs)
        shown = {key: value for key, value in logs.items() if "_model_" not in key and isinstance(value, (int, float))}
        texts = ", ".join(f"{key} {value:.6g}" for key, value in shown.items())
        _LOGGER.info("epoch %d: %s", self.trainer.current_epoch, texts)

    def report_step(self, logs: Mapping[str, Any]) -> None:
        """Send a step's logs where they go, every so many steps.

        Args:
            logs: What the training step returned.
        """
        if self.trainer.global_step % self.trainer.config.log_every_n_steps == 0 and self._loop.loggers:
            values = MetricSums(self._loop.training.num_models)
            values.add(logs, self._loop.early_stopping.counted())
            self._log({f"step_{key}": value for key, value in values.means().items()})

    def _log(self, values: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        for logger in self._loop.loggers:
            logger.log(numbers, self.trainer.current_epoch, self.trainer.global_step)

    def freeze(self, losses: dict[int, float]) -> None:
        """Freeze models whose losses are not finite.

        Args:
            losses: Model to loss.
        """
        for model, loss in losses.items():
            self._loop.early_stopping.stop_diverged(model, loss, self.trainer.global_step)
            _LOGGER.warning("model %d is frozen from now on: its loss is %s", model, loss)
        self._apply_stops()

    def _step_schedulers(self, logs: Mapping[str, Any] | None) -> None:
        trainer = self.trainer
        metric = trainer.config.monitor or trainer.config.early_stopping_metric
        if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in self._loop.schedulers) and logs is not None:
            required(logs, metric, "the metric of the plateau scheduler (checkpoint.monitor or early_stopping_metric)")
        values = trainer.model_metrics.get(metric, [])
        if logs is not None and len(values) != len(self._loop.schedulers):
            # One scheduler for all models watches their mean.
            values = [logs.get(metric)]
        # Nothing of a stopped model changes any more. Without a scheduler of its own, its parameter group is kept.
        stopped = [] if self._loop.training.num_models is None else list(self._loop.early_stopping.stopped)
        has_own = len(self._loop.schedulers) == self._loop.training.num_models
        with self._stopped_groups.kept([] if has_own else stopped):
            step_schedulers(
                self._loop.schedulers,
                None if logs is None else values,
                resumed_before_first_step=trainer.global_step > 0 and not self._steps_in_this_process,
                left_out=stopped if has_own else [],
            )

    def _stop_early(self, logs: Mapping[str, Any]) -> None:
        key = self.trainer.config.early_stopping_metric
        if self._loop.training.num_models is not None:
            if key in logs and key not in self.trainer.model_metrics:
                raise TrainerError(
                    f"early_stopping_metric = {key!r}",
                    received="one value for all models",
                    expected=f"a tensor [{self._loop.training.num_models}] from the step function, because each model "
                    "stops on its own",
                )
            values = required(self.trainer.model_metrics, key, "early_stopping_metric")
        else:
            values = [required(logs, key, "early_stopping_metric")]
        newly = self._loop.early_stopping.update(values)
        for model in newly:
            who = "training" if len(self._loop.training.patiences) == 1 else f"model {model}"
            _LOGGER.info("%s stops early: %s", who, self._loop.early_stopping.stopped[model])
        if newly:
            self._apply_stops()

    def _apply_stops(self) -> None:
        self._loop.training.set_active(self._loop.early_stopping.active())
        self.trainer.stopped_models = dict(self._loop.early_stopping.stopped)
        self.trainer.diverged_models = set(self._loop.early_stopping.diverged)
        if self._loop.early_stopping.all_stopped():
            self.trainer.stop_training = True
