"""A population: the models of one `ModelBatch`, trained, compared, and halved again and again."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from mb_torch import ModelBatch
from trainers.callbacks import TrainingCallback
from trainers.config.errors import ConfigurationError
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.per_model import PerModel
from trainers.population.best_models import BestModels
from trainers.population.halving import Halving, ranked
from trainers.population.history import History
from trainers.population.rungs import Rungs, halved, history_of
from trainers.preemption.signals import SignalFlags
from trainers.reporting.loggers import messages_as_configured
from trainers.reporting.metrics import epoch_logs, required
from trainers.settings import GenericTrainerConfig

_LOGGER = logging.getLogger(__name__)


class _Trainer(GenericTrainer):
    """Says when it begins; heeds the signals, too, that came when the trainer before had looked for the last time."""

    late: SignalFlags | None = None
    begins: Callable[[], None] | None = None

    def on_training_start(self) -> None:
        if self.begins is not None:
            self.begins()
        if self.late is not None:
            self.signal_flags.received.extend(self.late.received)
            self.late.clear()


class Population:
    """Trains a batch of models with one trainer, and says which is which and which is best.

    A run is resumed exactly. One that is halved has a folder of checkpoints (and logs) for each of its rungs, the
    epochs between two selections; it is resumed exactly between them as well, and its models end as they would have
    without halving.

    Args:
        batch: The models. After a halving they have the weights they had at the first selection; see `model`.
        make_optimizer: ``make_optimizer(batch, models)`` returns an optimizer of ``batch``, which holds the given
            models of the population in this order, or a pair of an optimizer and its scheduler (or schedulers).
        loss_fn: ``loss_fn(outputs, targets)`` of one model.
        names: Of the models. Default: ``"model_0"`` and so on.
        config: Of the trainer.
        metrics: As for `GenericTrainer`.
        per_model: As for `GenericTrainer`.
        keep_best: A metric; each model's weights at its best value are kept. Default: none are.
        mode: ``"min"`` or ``"max"`` of ``keep_best``.

    Attributes:
        names: Of the models.
        history: Metrics of every epoch and model.
        best_models: The weights at each model's best; None without ``keep_best``.
        trainer: That trains, or trained last.

    Raises:
        ConfigurationError: There are names or settings of another number of models, names that are not all different,
            or no such mode.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mb_torch import OptimizerFactory
        >>> batch = ModelBatch([nn.Linear(2, 1)] * 3)
        >>> def make_optimizer(batch, models):
        ...     rates = [{"lr": (0.001, 0.01, 0.1)[model]} for model in models]
        ...     return OptimizerFactory(torch.optim.SGD).create_optimizer(batch, rates)
        >>> batches = [(torch.ones(4, 2), torch.full((4, 1), 10.0))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = GenericTrainerConfig(checkpoint_dir=folder, max_epochs=4)
        ...     population = Population(batch, make_optimizer, loss_fn=nn.functional.mse_loss, config=config)
        ...     population.fit(batches, halving=Halving(every_n_epochs=2, metric="loss"))
        >>> population.best("loss"), population.history.dropped
        ('model_2', {'model_0': 1})
    """

    def __init__(
        self,
        batch: ModelBatch,
        make_optimizer: Callable[[ModelBatch, list[int]], Any],
        *,
        loss_fn: Callable[..., Any],
        names: Sequence[str] | None = None,
        config: GenericTrainerConfig | None = None,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        per_model: PerModel | None = None,
        keep_best: str | None = None,
        mode: str = "min",
    ) -> None:
        self.names = [f"model_{model}" for model in range(batch.num_models)] if names is None else list(names)
        if len(self.names) != batch.num_models or len(set(self.names)) != len(self.names):
            raise ConfigurationError(
                f"names: received {len(self.names)} with {len(set(self.names))} different; expected "
                f"{batch.num_models}, one per model"
            )
        if per_model is not None:
            per_model.check(batch.num_models)
        self.history = History(self.names)
        self.best_models = None if keep_best is None else BestModels(keep_best, mode, self.history)
        self._batch = batch
        self._make_optimizer = make_optimizer
        self._loss_fn = loss_fn
        self._metrics = dict(metrics or {})
        self._keep_best = keep_best
        self._per_model = per_model or PerModel()
        self._config = config or GenericTrainerConfig()
        self._has_begun = False
        self._callbacks: list[TrainingCallback] = [self.history]
        if self.best_models is not None:
            self._callbacks.append(self.best_models)
        self.trainer = self._make_trainer(self._config)

    @property
    def models(self) -> list[int]:
        """Numbers of the models that are left, in the order of the trainer's batch."""
        return [self.names.index(name) for name in self.history.models]

    def add_callback(self, callback: TrainingCallback) -> None:
        """Have a callback called by every trainer of this population.

        Args:
            callback: To be called.
        """
        self._callbacks.append(callback)
        self.trainer.add_callback(callback)

    def fit(self, train_loader: Any, val_loader: Any = None, *, halving: Halving | None = None) -> None:
        """Train all models, or go on from the newest checkpoint, to the end.

        Returns also when a signal asked for it (``trainer.preempted``); the run was saved then. A call that is refused
        leaves the results of an earlier one as they are.

        Args:
            train_loader: As for `GenericTrainer.fit`.
            val_loader: Likewise.
            halving: When to drop the worse part of the models. Default: all are trained to the end.

        Raises:
            TrainerError: Training or resuming fails, a metric that is asked for is none of this run, or the folder has
                the checkpoints of other models or of a run that was halved in another way.
            ConfigurationError: The settings do not go together with halving.
        """
        self._check_metrics(halving, has_validation=val_loader is not None)
        trainer, history = self.trainer, copy.copy(self.history)
        bests = None if self.best_models is None else self.best_models.bests
        self._has_begun = False
        try:
            self._fit_all(train_loader, val_loader, halving)
        except BaseException:
            if not self._has_begun:
                self.trainer = trainer
                vars(self.history).update(vars(history))
                if self.best_models is not None and bests is not None:
                    self.best_models.bests = bests
            raise

    def _fit_all(self, train_loader: Any, val_loader: Any, halving: Halving | None) -> None:
        rungs = Rungs(self._config)
        if halving is None:
            rungs.refuse_any()
            self._begin(None)
            if self.trainer.config is not self._config:
                self.trainer = self._make_trainer(self._config)
            self._fit(self._batch, train_loader, val_loader)
        else:
            rung, content = rungs.newest()
            self._begin(halving)
            if content is not None:
                self.history.load_state_dict(history_of(content))
            self._fit_rungs(rungs, rung, halving, train_loader, val_loader)

    def table(self) -> list[dict[str, Any]]:
        """Return one row per model: its name, what became of it, and its last metrics.

        Returns:
            Rows in the order of the population, with the keys ``name``, ``state`` (``"trained"``, or why it ended
            earlier), ``epochs`` and those of the metrics.

        Example:
            See `Population`; ``pandas.DataFrame(population.table())`` makes a data frame of it.
        """
        return [
            {"name": name, "state": self._state(name), "epochs": self.history.epochs(name)} | self.history.last(name)
            for name in self.names
        ]

    def best(self, metric: str = "val_loss", mode: str = "min") -> str:
        """Return the name of the model with the best last value, of those that were not dropped.

        Args:
            metric: To compare by.
            mode: ``"min"`` or ``"max"``.

        Raises:
            ConfigurationError: There is no such mode.
            TrainerError: No model has a finite value.
        """
        last = {name: self.history.last(name) for name in self.history.models}
        best_first = ranked({name: values.get(metric, math.nan) for name, values in last.items()}, mode)
        if not best_first:
            known = sorted({key for values in last.values() for key in values})
            raise TrainerError(
                f"metric {metric!r} has no finite value",
                expected=f"one of {known}",
                fix="Train first; table() says what became of each model.",
            )
        return best_first[0]

    def model(self, name: str, *, best: bool = False) -> nn.Module:
        """Return a model as a plain module with its own copy of the weights.

        Args:
            name: Of the model.
            best: Whether to return the weights at its best value of ``keep_best`` instead of the last ones; models that
                were dropped have them too.

        Raises:
            TrainerError: There is no such model or no such weights, or the model was dropped.
        """
        if name not in self.names:
            raise TrainerError(
                f"model {name!r}", received="no name of this population", expected=f"one of {self.names}"
            )
        if best:
            if self.best_models is None:
                raise TrainerError("best=True", received="a population without keep_best", expected="one with it")
            state = self.best_models.state_of(name)
            module: nn.Module = self._batch.model(self.names.index(name))
            module.load_state_dict(state)
            return module
        if name not in self.history.models:
            raise TrainerError(
                f"model {name!r}",
                received=f"a model that was {self._state(name)}",
                expected=f"one of {self.history.models}",
                fix="Its last weights are in a checkpoint of the rung before.",
            )
        if self.trainer.model is None:
            return self._batch.model(self.names.index(name))
        return self.trainer.model.model(self.history.models.index(name))

    def _note_begin(self) -> None:
        self._has_begun = True

    def _begin(self, halving: Halving | None) -> None:
        """Forget an earlier call of `fit`."""
        self.history.begin(halving)
        if self.best_models is not None:
            self.best_models.bests = {}

    def _fit_rungs(self, rungs: Rungs, rung: int, halving: Halving, train_loader: Any, val_loader: Any) -> None:
        """Train from a rung on to the end."""
        late = SignalFlags(self._config.signal_numbers())
        # Between two rungs as well a signal is noted; the next one heeds it.
        late.install(and_interrupt=False)
        try:
            while True:
                end = self._end_of_rung(rung, halving)
                self.trainer = self._make_trainer(rungs.config(rung, end), late)
                is_whole = self.history.models == self.names
                self._fit(self._batch if is_whole else self._batch.select(self.models), train_loader, val_loader)
                late.received.extend(self.trainer.late_signals)
                if self.trainer.preempted:
                    return
                self.trainer.store.look()
                content = self.trainer.store.newest()
                if end == self._config.max_epochs or self._is_over(content, end):
                    return
                rung += 1
                with messages_as_configured(self.trainer.config.logging):
                    content = rungs.begin(rung, halved(content, self.names, halving))
                self.history.load_state_dict(history_of(content))
        finally:
            late.restore()
            self.trainer.late_signals = late.received

    def _end_of_rung(self, rung: int, halving: Halving) -> int:
        """Epochs of the run by the end of a rung; the last one begins when no model is to be dropped any more."""
        count, last = len(self.history.models), self._config.max_epochs
        return last if halving.survivors(count) == count else min((rung + 1) * halving.every_n_epochs, last)

    def _is_over(self, content: Mapping[str, Any], end: int) -> bool:
        """Whether the run ended, at the latest with the rung, for another reason than the number of epochs."""
        steps = self._config.max_steps
        return (
            self.trainer.stop_training
            # Of an earlier process, which a callback stopped at the end of the rung. Earlier versions do not say it.
            or content.get("stop_training", False)
            or content["epoch"] + 1 < end
            or content["resume_state"]["train"] is not None
            or (steps is not None and content["global_step"] >= steps)
            or len(self.trainer.stopped_models) == len(self.history.models)
        )

    def _check_metrics(self, halving: Halving | None, *, has_validation: bool) -> None:
        """Refuse, before the first batch, metrics that no epoch will have, or none at the end of a rung."""
        validated = dict.fromkeys(["loss", *self._metrics]) if has_validation else {}
        known = epoch_logs({"loss": None}, validated)
        if self._keep_best is not None:
            required(known, self._keep_best, "keep_best")
        if halving is None:
            return
        required(known, halving.metric, "Halving.metric")
        interval = self._config.validate_every_n_epochs
        if halving.metric != "loss" and halving.every_n_epochs % interval:
            raise ConfigurationError(
                f"Halving.every_n_epochs: received {halving.every_n_epochs} with a validation every {interval} epochs; "
                "expected a multiple, so that a selection follows a validation"
            )
        if halving.every_n_epochs >= self._config.max_epochs:
            _LOGGER.warning(
                "Halving.every_n_epochs = %d drops no model within max_epochs = %d",
                halving.every_n_epochs,
                self._config.max_epochs,
            )

    def _fit(self, batch: ModelBatch, train_loader: Any, val_loader: Any) -> None:
        made = self._make_optimizer(batch, list(self.models))
        optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
        self.trainer.fit(batch, optimizer, train_loader, val_loader, scheduler)

    def _make_trainer(self, config: GenericTrainerConfig, late: SignalFlags | None = None) -> GenericTrainer:
        trainer = _Trainer(
            config, loss_fn=self._loss_fn, metrics=self._metrics, per_model=self._per_model.of_models(self.models)
        )
        trainer.late, trainer.begins = late, self._note_begin
        for callback in self._callbacks:
            trainer.add_callback(callback)
        return trainer

    def _state(self, name: str) -> str:
        if name in self.history.dropped:
            return f"dropped after epoch {self.history.dropped[name]}"
        reason = self.trainer.stopped_models.get(self.history.models.index(name))
        return "trained" if reason is None else f"stopped: {reason}"
