"""Keeps the weights that each model of a population had when it was best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from trainers.callbacks import TrainingCallback
from trainers.config.modes import sign_of
from trainers.errors import TrainerError
from trainers.population.history import History

if TYPE_CHECKING:
    from trainers.generic import GenericTrainer


class Best(NamedTuple):
    """A model when it was best.

    Attributes:
        value: Of the metric.
        epoch: From 0.
        step: Optimizer steps done.
        state: Its ``state_dict()``, on the CPU.
    """

    value: float
    epoch: int
    step: int
    state: dict[str, Tensor]


class BestModels(TrainingCallback):
    """Copies a model's state whenever its metric is better than ever; saved with the run.

    Args:
        metric: A key of the trainer's metrics.
        mode: ``"min"`` or ``"max"``.
        history: Of the population, called before this: says which models the trainer has, and their metrics.

    Attributes:
        bests: By name, of the models that ever had a finite value.

    Raises:
        ConfigurationError: There is no such mode.

    Example:
        >>> BestModels("val_loss", "min", History(["small", "large"])).bests
        {}
    """

    def __init__(self, metric: str, mode: str, history: History) -> None:
        self.bests: dict[str, Best] = {}
        self._metric = metric
        self._sign = sign_of(mode)
        self._history = history

    def on_epoch_end(self, trainer: GenericTrainer, epoch: int, logs: dict[str, Any]) -> None:
        """Copy the states of the models that are better than ever."""
        # A model that was stopped, or an epoch without validation, has no value.
        values = [self._history.at(name, epoch).get(self._metric, math.nan) for name in self._history.models]
        better = [place for place, value in enumerate(values) if self._is_better(self._history.models[place], value)]
        states = trainer.model.get_model_states() if better else []
        for place in better:
            own = {name: tensor.cpu() for name, tensor in states[place].items()}
            self.bests[self._history.models[place]] = Best(values[place], epoch, trainer.global_step, own)

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Return a model's state when it was best.

        Args:
            name: Of the model.

        Raises:
            TrainerError: It never had a finite value.
        """
        if name not in self.bests:
            raise TrainerError(f"model {name!r} has no best state", received=f"no finite {self._metric} so far")
        return self.bests[name].state

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain data; what concerns one model is under its name."""
        return {"by_model": {name: best._asdict() for name, best in self.bests.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        self.bests = {name: Best(**best) for name, best in state["by_model"].items()}

    def _is_better(self, name: str, value: float) -> bool:
        if not math.isfinite(value):
            return False
        return name not in self.bests or self._sign * value < self._sign * self.bests[name].value
