"""Metrics: what counts as one, and means over the batches of an epoch, of all models together and of each."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.errors import TrainerError


class MetricSums:
    """Unweighted batch means of what step functions return: a smaller last batch counts as much as any other.

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

    def add(self, values: Mapping[str, Any], counted: Tensor | None = None) -> None:
        """Add what a step returned for one batch.

        Args:
            values: By name; neither numbers nor tensors of one element (or one per model) are left out.
            counted: Models ``[num_models]`` that count in the mean over the models. Default: all.
        """
        for key, value in values.items():
            if self._is_per_model(value):
                own = value.detach().double().cpu()
                self._model_sums[key] = self._model_sums[key] + own if key in self._model_sums else own
                self._model_counts[key] = self._model_counts.get(key, 0) + 1
                in_mean = own if counted is None or not counted.any() else own[counted]
                self._add_number(key, float(in_mean.mean()))
            else:
                number = as_number(value)
                if number is not None:
                    self._add_number(key, number)

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


def as_number(value: Any) -> float | None:
    """Return a value as a number, if it is one.

    Args:
        value: A number of Python or NumPy, or a tensor or array of one element; anything else gives None.

    Example:
        >>> as_number(torch.tensor([2])), as_number(np.float32(0.5)), as_number("0.5")
        (2.0, 0.5, None)
    """
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    if isinstance(value, np.ndarray):
        # Of numbers: texts and objects could be turned into a number too.
        return float(value.item()) if value.size == 1 and value.dtype.kind in "biuf" else None
    return float(value) if isinstance(value, (numbers.Real, np.bool_)) else None


def description(value: Any) -> str:
    """Return what a value is, for messages.

    Args:
        value: Of any kind.

    Example:
        >>> description(torch.ones(2, 3)), description(None)
        ('a tensor [2, 3]', 'a NoneType')
    """
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class MetricFunction:
    """A metric as a `ModelBatch` needs it: it returns a tensor without dimensions.

    Args:
        name: Of the metric, for errors.
        function: ``function(outputs, targets)`` of one model.

    Raises:
        TrainerError: When called, if the function returns neither a number nor a tensor of one element.

    Example:
        >>> MetricFunction("rows", lambda outputs, targets: len(outputs))(torch.ones(3, 1), None)
        tensor(3., dtype=torch.float64)
    """

    def __init__(self, name: str, function: Callable[[Any, Any], Any]) -> None:
        self._name = name
        self._function = function

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the metric of one model."""
        value = self._function(outputs, targets)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
        number = as_number(value)
        if number is None:
            raise TrainerError(
                f"metrics[{self._name!r}]",
                received=description(value),
                expected="a number or a tensor of one element",
                fix="Reduce over the rows, for example with .mean().",
            )
        return torch.tensor(number, dtype=torch.float64)


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
