"""Means over the batches of an epoch, of all models together and of each, and what early stopping makes of them."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainers.errors import TrainerError

_LOGGER = logging.getLogger(__name__)
_NOT_IMPROVED = "no improvement on"


class MetricSums:
    """Unweighted batch means of what step functions return.

    Args:
        num_models: Of the `ModelBatch` that is trained; None for a single model. Values ``[num_models]`` are averaged
            for each model.

    Example:
        >>> sums = MetricSums()
        >>> sums.add({"loss": 1.0, "note": "ignored"})
        >>> sums.add({"loss": torch.tensor([3.0])})
        >>> sums.means()
        {'loss': 2.0}
    """

    def __init__(self, num_models: int | None = None) -> None:
        self._num_models = num_models
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._model_sums: dict[str, Tensor] = {}
        self._model_counts: dict[str, int] = {}
        self.num_samples = 0

    def add(self, values: Mapping[str, Any], active: Tensor | None = None) -> None:
        """Add what a step returned for one batch.

        Args:
            values: By name; neither numbers nor tensors of one element (or one per model) are left out.
            active: Models ``[num_models]`` that count in the mean over the models. Default: all.
        """
        for key, value in values.items():
            if self._is_per_model(value):
                own = value.detach().double().cpu()
                self._model_sums[key] = self._model_sums[key] + own if key in self._model_sums else own
                self._model_counts[key] = self._model_counts.get(key, 0) + 1
                counted = own if active is None or not active.any() else own[active]
                self._add_number(key, float(counted.mean()))
            elif isinstance(value, Tensor):
                if value.numel() == 1:
                    self._add_number(key, float(value.detach()))
            elif isinstance(value, numbers.Real):
                self._add_number(key, float(value))

    def means(self) -> dict[str, float]:
        """Return the means over batches (and models)."""
        return {key: total / self._counts[key] for key, total in self._sums.items()}

    def model_means(self) -> dict[str, list[float]]:
        """Return each model's means over batches: lists of ``num_models``."""
        return {key: (total / self._model_counts[key]).tolist() for key, total in self._model_sums.items()}

    def loss_sum(self) -> float:
        """Return the sum of the losses; 0 without any."""
        return self._sums.get("loss", 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain data."""
        return {
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "model_sums": dict(self._model_sums),
            "model_counts": dict(self._model_counts),
        }

    def load_state_dict(self, state: Mapping[str, Any], num_samples: int) -> None:
        """Go on with sums from `state_dict`.

        Args:
            state: The sums.
            num_samples: Samples so far.
        """
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._model_sums, self._model_counts = dict(state["model_sums"]), dict(state["model_counts"])
        self.num_samples = num_samples

    def _is_per_model(self, value: Any) -> bool:
        return self._num_models is not None and isinstance(value, Tensor) and value.shape == (self._num_models,)

    def _add_number(self, key: str, value: float) -> None:
        self._sums[key] = self._sums.get(key, 0.0) + value
        self._counts[key] = self._counts.get(key, 0) + 1


def epoch_logs(train: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, Any]:
    """Join the means of an epoch to one flat dict.

    Args:
        train: Of the training batches.
        validation: Of the validation batches, empty without validation.

    Returns:
        Every key. A validation key without ``val_`` is there as ``val_<key>`` as well; the bare key stays with training
        where both have it.

    Example:
        >>> epoch_logs({"loss": 1.0}, {"loss": 2.0, "accuracy": 0.5})
        {'loss': 1.0, 'val_loss': 2.0, 'accuracy': 0.5, 'val_accuracy': 0.5}
    """
    logs = dict(train)
    for key, value in validation.items():
        if key.startswith("val_"):
            logs[key] = value
            continue
        logs.setdefault(key, value)
        logs[f"val_{key}"] = value
    return logs


def model_metrics_of(logs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Collect the values of single models from the logs of an epoch.

    Args:
        logs: Flat; key ``k`` of model i is ``k_model_i``, in the order of the models.

    Returns:
        One list per key; empty for a single module.

    Example:
        >>> model_metrics_of({"loss": 1.5, "loss_model_0": 1.0, "loss_model_1": 2.0})
        {'loss': [1.0, 2.0]}
    """
    found: dict[str, list[Any]] = {}
    for key in logs:
        own = f"{key}_model_"
        values = [value for other, value in logs.items() if other.startswith(own) and other[len(own) :].isdigit()]
        if values:
            found[key] = values
    return found


def required(logs: Mapping[str, Any], key: str, setting: str) -> Any:
    """Look a metric up that a setting names.

    Args:
        logs: Of an epoch.
        key: The metric.
        setting: That names it, for the error.

    Raises:
        TrainerError: It is not there; lists what is.
    """
    if key not in logs:
        raise TrainerError(
            f"{setting} = {key!r} is no metric of this run", expected=f"one of {sorted(logs)}", fix="Set it to one."
        )
    return logs[key]


_DIVERGED = "its loss was"


def divergence(loss: float, step: int) -> str:
    """Return the reason of a model that is stopped because of its loss.

    Args:
        loss: NaN or infinite.
        step: Optimizer steps done.

    Example:
        >>> is_divergence(divergence(float("nan"), 7))
        True
    """
    return f"{_DIVERGED} {loss} after step {step}"


def is_divergence(reason: str) -> bool:
    """Whether a reason is one of `divergence`.

    Args:
        reason: Why a model was stopped.
    """
    return reason.startswith(_DIVERGED)


class EarlyStopping:
    """Counts, for every model, the validations since its best value.

    Args:
        patiences: For each model, the validations in a row without a new best that stop it; None never does.
        mode: ``"min"`` or ``"max"``.

    Attributes:
        stopped: Models that were stopped, with the reason.

    Example:
        >>> early = EarlyStopping([2], mode="min")
        >>> [early.update([loss]) for loss in (1.0, 0.5, 0.6, 0.5)]
        [[], [], [], [0]]
    """

    def __init__(self, patiences: Sequence[int | None], mode: str) -> None:
        self.stopped: dict[int, str] = {}
        self._patiences = patiences
        self._mode = mode
        self._best: list[float | None] = [None] * len(patiences)
        self._waited = [0] * len(patiences)
        self._active: Tensor | None = None
        self._stopped_in_active = 0

    @property
    def is_on(self) -> bool:
        """Whether values are wanted."""
        return any(patience is not None for patience in self._patiences)

    def update(self, values: list[float]) -> list[int]:
        """Take the values of one validation.

        Args:
            values: One per model. NaN is never an improvement.

        Returns:
            The models that are to stop now.
        """
        newly = []
        for model, value in enumerate(values):
            if model in self.stopped:
                continue
            if self._is_better(value, self._best[model]):
                self._best[model], self._waited[model] = value, 0
                continue
            self._waited[model] += 1
            if self._is_over(model, self._waited[model]):
                self.stopped[model] = f"{_NOT_IMPROVED} {self._best[model]} in {self._waited[model]} validations"
                newly.append(model)
        return newly

    def all_stopped(self) -> bool:
        """Whether no model is left."""
        return len(self.stopped) == len(self._best)

    def active(self) -> Tensor | None:
        """Return ``[num_models]`` bool, the models that are left; None while none was stopped."""
        if not self.stopped:
            return None
        # Asked for with every batch. Models are only ever added to those that are stopped.
        if len(self.stopped) != self._stopped_in_active:
            self._active = torch.tensor([model not in self.stopped for model in range(len(self._best))])
            self._stopped_in_active = len(self.stopped)
        return self._active

    def state_dict(self) -> dict[str, Any]:
        """Return bests, counts and stopped models as plain data."""
        return {"best": list(self._best), "waited": list(self._waited), "stopped": dict(self.stopped)}

    def revived(self, state: Mapping[str, Any]) -> list[int]:
        """Return the models that were stopped in a state, and would not have been with the patience of now.

        Args:
            state: From `state_dict`.

        Example:
            >>> state = {"best": [0.5, 0.5], "waited": [2, 3], "stopped": {0: "no improvement on 0.5", 1: "its loss"}}
            >>> EarlyStopping([3, 4], "min").revived(state)
            [0]
        """
        return [
            model
            for model, reason in state["stopped"].items()
            if reason.startswith(_NOT_IMPROVED) and not self._is_over(model, state["waited"][model])
        ]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; models are trained again where the patience was raised since.

        Args:
            state: From `state_dict`.

        Raises:
            TrainerError: It is of another number of models.
        """
        if len(state["best"]) != len(self._best):
            raise TrainerError(
                "early stopping at resume", received=f"{len(self._best)} models", expected=f"{len(state['best'])}"
            )
        self._best, self._waited = list(state["best"]), list(state["waited"])
        revived = self.revived(state)
        if revived and len(self._best) > 1:
            _LOGGER.warning(
                "the patience was raised: models %s are trained again, from the weights with which they were stopped. "
                "Those that were stopped before the others have missed the epochs between",
                revived,
            )
        self.stopped = {model: reason for model, reason in state["stopped"].items() if model not in revived}
        self._stopped_in_active = 0

    def _is_over(self, model: int, waited: int) -> bool:
        patience = self._patiences[model] if model < len(self._patiences) else None
        return patience is not None and waited >= patience

    def _is_better(self, value: float, best: float | None) -> bool:
        if math.isnan(value):
            return False
        return best is None or (value < best if self._mode == "min" else value > best)
