"""The metrics of every epoch and model of a population."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trainers.callbacks import TrainingCallback
from trainers.errors import TrainerError
from trainers.population.halving import Halving

if TYPE_CHECKING:
    from trainers.generic import GenericTrainer

_LOGGER = logging.getLogger(__name__)


class History(TrainingCallback):
    """Notes each model's metrics after every epoch; saved with the run.

    Args:
        names: Of the models.

    Attributes:
        models: Names of the models that are left, in the order of the trainer's batch.
        dropped: The others: the epoch (from 0) after which each was dropped.

    Example:
        >>> History(["small", "large"]).last("small")
        {}
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self.begin(None)

    def begin(self, halving: Halving | None) -> None:
        """Forget everything: another run begins, or goes on from a checkpoint that is loaded next.

        Args:
            halving: Of the run; a checkpoint of a run with another one is refused.
        """
        self.models = list(self._names)
        self.dropped: dict[str, int] = {}
        self._halving = None if halving is None else asdict(halving)
        self._values: dict[str, dict[str, dict[int, float]]] = {name: {} for name in self._names}
        # Models that were stopped in an earlier epoch are computed along, but learn nothing.
        self._stopped: set[str] = set()

    def on_training_start(self, trainer: GenericTrainer) -> None:
        """Forget that models were stopped which are trained again: their patience was raised since."""
        self._stopped &= {self.models[place] for place in trainer.stopped_models}

    def on_epoch_end(self, trainer: GenericTrainer, epoch: int, logs: dict[str, Any]) -> None:
        """Note the metrics of the epoch."""
        for metric, values in trainer.model_metrics.items():
            for name, value in zip(self.models, values, strict=True):
                if name not in self._stopped:
                    self._values[name].setdefault(metric, {})[epoch] = value
        for place, reason in trainer.stopped_models.items():
            if self.models[place] not in self._stopped:
                _LOGGER.info("%s was stopped in epoch %d: %s", self.models[place], epoch, reason)
        self._stopped = {self.models[place] for place in trainer.stopped_models}

    def drop_all_but(self, names: Collection[str], epoch: int) -> None:
        """Note that some models are dropped.

        Args:
            names: Of those that go on.
            epoch: After which.
        """
        self.dropped.update({name: epoch for name in self.models if name not in names})
        self.models = [name for name in self.models if name in names]

    def of_model(self, name: str) -> dict[str, dict[int, float]]:
        """Return a model's values by metric and epoch.

        Args:
            name: Of the model.
        """
        return {metric: dict(values) for metric, values in self._values[name].items()}

    def at(self, name: str, epoch: int) -> dict[str, float]:
        """Return a model's metrics of one epoch; empty if it was not trained then.

        Args:
            name: Of the model.
            epoch: From 0.
        """
        return {metric: values[epoch] for metric, values in self._values[name].items() if epoch in values}

    def last(self, name: str) -> dict[str, float]:
        """Return a model's last value of every metric.

        Args:
            name: Of the model.
        """
        return {metric: list(values.values())[-1] for metric, values in self._values[name].items()}

    def epochs(self, name: str) -> int:
        """Return how many epochs a model was trained.

        Args:
            name: Of the model.
        """
        return max((epoch + 1 for values in self._values[name].values() for epoch in values), default=0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain data; what concerns one model is under its name."""
        by_model = {
            name: {
                "values": self.of_model(name),
                "dropped": self.dropped.get(name),
                "stopped": name in self._stopped,
            }
            for name in self._names
        }
        return {"models": list(self.models), "halving": self._halving, "by_model": by_model}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.

        Raises:
            TrainerError: It is of other models, or of a run that was halved in another way.
        """
        models, by_model = list(state["models"]), state["by_model"]
        # With the same names in another order every model would go on with the settings of another one.
        if list(by_model) != self._names or models != [name for name in self._names if name in models]:
            raise _of_another_run("the models", list(by_model), self._names)
        if state.get("halving") != self._halving:
            raise _of_another_run("halving", state.get("halving"), self._halving)
        self.models = models
        self._values = {name: {key: dict(own) for key, own in by_model[name]["values"].items()} for name in self._names}
        self._stopped = {name for name, own in by_model.items() if own["stopped"]}
        self.dropped = {name: own["dropped"] for name, own in by_model.items() if own["dropped"] is not None}


def _of_another_run(what: str, received: object, expected: object) -> TrainerError:
    return TrainerError(
        f"{what} of the population at resume",
        received=f"a checkpoint of {received}",
        expected=f"one of {expected}",
        fix="Use another checkpoint_dir, or what that run was begun with.",
    )
