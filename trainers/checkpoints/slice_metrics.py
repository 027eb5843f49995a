"""Early stopping, metrics and their sums in checkpoints of a `ModelBatch`, by models; used by `slices`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainers.errors import TrainerError
from trainers.reporting.early_stopping import diverged_models


def are_same(one: Any, other: Any) -> bool:
    """Whether plain data is equal; NaN equals NaN.

    Args:
        one: Tensors, numbers, strings, lists and dicts.
        other: Likewise.

    Example:
        >>> are_same({"a": [torch.ones(2), math.nan]}, {"a": [torch.ones(2), math.nan]})
        True
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(are_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(are_same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and bool(one == other)


def differ(what: str, received: object, expected: str) -> TrainerError:
    """Return the error for checkpoints that cannot be joined.

    Args:
        what: In what they differ.
        received: How.
        expected: What could be joined.

    Example:
        >>> str(differ("loss scaling", "with and without", "one or the other"))
        'checkpoints to be joined differ in loss scaling: received with and without; expected one or the other'
    """
    return TrainerError(f"checkpoints to be joined differ in {what}", received=received, expected=expected)


def select_early(early: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """Return the early stopping of some models.

    Args:
        early: From ``EarlyStopping.state_dict``.
        chosen: Which models.

    Example:
        >>> select_early({"best": [0.1, 0.2], "waited": [0, 1], "stopped": {1: "why"}, "diverged": []}, [1])
        {'best': [0.2], 'waited': [1], 'stopped': {0: 'why'}, 'diverged': []}
    """
    stopped, diverged = early["stopped"], diverged_models(early)
    return {
        "best": [early["best"][model] for model in chosen],
        "waited": [early["waited"][model] for model in chosen],
        "stopped": {place: stopped[model] for place, model in enumerate(chosen) if model in stopped},
        "diverged": [place for place, model in enumerate(chosen) if model in diverged],
    }


def join_early(parts: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """Return the early stopping of several batches as that of one.

    Args:
        parts: Of each batch.
        counts: How many models each has.

    Example:
        >>> stopped = {"best": [0.2], "waited": [1], "stopped": {0: "why"}, "diverged": [0]}
        >>> join_early([{"best": [0.1], "waited": [0], "stopped": {}, "diverged": []}, stopped], [1, 1])
        {'best': [0.1, 0.2], 'waited': [0, 1], 'stopped': {1: 'why'}, 'diverged': [1]}
    """
    stopped: dict[int, str] = {}
    diverged: list[int] = []
    first = 0
    for early, count in zip(parts, counts, strict=True):
        stopped.update({first + model: reason for model, reason in early["stopped"].items()})
        diverged.extend(first + model for model in diverged_models(early))
        first += count
    return {
        "best": [value for early in parts for value in early["best"]],
        "waited": [value for early in parts for value in early["waited"]],
        "stopped": stopped,
        "diverged": diverged,
    }


def counted_models(early: Mapping[str, Any], count: int) -> list[int]:
    """Return the models that a mean over the models is taken over: all but the diverged ones, or all if all are.

    Args:
        early: Early stopping of the models.
        count: How many there are.

    Example:
        >>> counted_models({"best": [0.1, 0.2], "waited": [0, 1], "stopped": {1: "why"}, "diverged": [1]}, 2)
        [0]
    """
    diverged = diverged_models(early)
    return [model for model in range(count) if model not in diverged] or list(range(count))


def select_metrics(
    metrics: Mapping[str, Any], chosen: Sequence[int], count: int, counted: Sequence[int]
) -> dict[str, Any]:
    """Return an epoch's logs for some models.

    Args:
        metrics: Logs, with ``<key>_model_<i>`` beside a key that is per model.
        chosen: Which models.
        count: How many there are.
        counted: Which of the chosen ones, by their new numbers, count in means.

    Example:
        >>> select_metrics({"loss": 2.0, "lr": 0.1, "loss_model_0": 1.0, "loss_model_1": 3.0}, [1], 2, [0])
        {'loss': 3.0, 'lr': 0.1, 'loss_model_0': 3.0}
    """
    others, values = _taken_apart(metrics, count)
    return _as_logs(others, {key: [own[model] for model in chosen] for key, own in values.items()}, counted)


def join_metrics(parts: Sequence[Mapping[str, Any]], counts: Sequence[int], counted: Sequence[int]) -> dict[str, Any]:
    """Return the logs of several batches as those of one.

    Args:
        parts: Of each batch.
        counts: How many models each has.
        counted: Which models of all, by their new numbers, count in means.

    Returns:
        The logs. A number that is not per model is averaged, by the number of models.

    Raises:
        TrainerError: They have different keys.

    Example:
        >>> join_metrics([{"loss": 1.0, "loss_model_0": 1.0}, {"loss": 3.0, "loss_model_0": 3.0}], [1, 1], [0, 1])
        {'loss': 2.0, 'loss_model_0': 1.0, 'loss_model_1': 3.0}
    """
    apart = [_taken_apart(metrics, count) for metrics, count in zip(parts, counts, strict=True)]
    others, values = apart[0]
    for other, own in apart[1:]:
        if other.keys() != others.keys() or own.keys() != values.keys():
            raise differ("metrics", sorted(other), f"{sorted(others)}, as the first")
    shared = {key: _shared([other[key] for other, _ in apart], counts) for key in others}
    return _as_logs(shared, {key: [value for _, own in apart for value in own[key]] for key in values}, counted)


def own_metrics(metrics: Mapping[str, Any], model: int, count: int) -> dict[str, Any]:
    """Return an epoch's logs as one model would have them alone.

    Args:
        metrics: Logs of all.
        model: Which model.
        count: How many there are.

    Example:
        >>> own_metrics({"loss": 2.0, "lr": 0.1, "loss_model_0": 1.0, "loss_model_1": 3.0}, 1, 2)
        {'loss': 3.0, 'lr': 0.1}
    """
    others, values = _taken_apart(metrics, count)
    return {key: values[key][model] if key in values else value for key, value in others.items()}


def with_sums(
    states: Sequence[Mapping[str, Any]], combine: Callable[[list[Mapping[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """Return the first of some resume states with other sums of the epoch and of the validation that are not over.

    Args:
        states: From ``ResumeState.to_dict``.
        combine: Makes one ``MetricSums.state_dict`` of those of all states.

    Example:
        >>> state = {"train": None, "val": {"batch_idx": 1, "loss_sum": 0.0, "metrics": {"sums": {}}}}
        >>> with_sums([state], lambda sums: {"sums": {"loss": 2.0}})["val"]
        {'batch_idx': 1, 'loss_sum': 2.0, 'metrics': {'sums': {'loss': 2.0}}}
    """
    result = dict(states[0])
    for part, name in (("train", "additional_metrics"), ("val", "metrics")):
        if result[part] is not None:
            sums = combine([state[part][name] for state in states])
            result[part] = {**result[part], name: sums, "loss_sum": sums["sums"].get("loss", 0.0)}
    return result


def select_sums(sums: Mapping[str, Any], chosen: Sequence[int], counted: Sequence[int]) -> dict[str, Any]:
    """Return the sums of some models.

    Args:
        sums: From ``MetricSums.state_dict``.
        chosen: Which models.
        counted: Which of the chosen ones, by their new numbers, count in means.
    """
    return _averaged(
        {**sums, "model_sums": {key: own[list(chosen)] for key, own in sums["model_sums"].items()}}, counted
    )


def join_sums(parts: Sequence[Mapping[str, Any]], counts: Sequence[int], counted: Sequence[int]) -> dict[str, Any]:
    """Return the sums of several batches as those of one.

    Args:
        parts: Of each batch.
        counts: How many models each has.
        counted: Which models of all, by their new numbers, count in means.

    Raises:
        TrainerError: They are of different keys or numbers of batches.
    """
    first = parts[0]
    for key in ("counts", "model_counts"):
        if any(sums[key] != first[key] for sums in parts):
            raise differ("numbers of batches that metrics are from", [sums[key] for sums in parts], "the same in all")
    joined = {
        **first,
        "sums": {key: _shared([sums["sums"][key] for sums in parts], counts) for key in first["sums"]},
        "model_sums": {key: torch.cat([sums["model_sums"][key] for sums in parts]) for key in first["model_sums"]},
    }
    return _averaged(joined, counted)


def own_sums(sums: Mapping[str, Any], model: int) -> dict[str, Any]:
    """Return the sums as one model would have them alone.

    Args:
        sums: Of all.
        model: Which model.
    """
    own = {key: float(values[model]) for key, values in sums["model_sums"].items()}
    return {
        "sums": {**sums["sums"], **own},
        "counts": {**sums["counts"], **sums["model_counts"]},
        "model_sums": {},
        "model_counts": {},
    }


def _averaged(sums: Mapping[str, Any], counted: Sequence[int]) -> dict[str, Any]:
    """The sums with means over the models computed anew."""
    means = {
        key: float(own[list(counted)].mean())
        for key, own in sums["model_sums"].items()
        # Otherwise the key had one value for all models in some batches.
        if sums["counts"][key] == sums["model_counts"][key]
    }
    return {**sums, "sums": {**sums["sums"], **means}}


def _taken_apart(metrics: Mapping[str, Any], count: int) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The plain keys, and for those of them that are per model the models' values."""
    values = {
        key: [metrics[f"{key}_model_{model}"] for model in range(count)]
        for key in metrics
        if all(f"{key}_model_{model}" in metrics for model in range(count))
    }
    names = {f"{key}_model_{model}" for key in values for model in range(count)}
    return {key: value for key, value in metrics.items() if key not in names}, values


def _as_logs(others: Mapping[str, Any], values: Mapping[str, Sequence[Any]], counted: Sequence[int]) -> dict[str, Any]:
    """An epoch's logs in the trainer's order: plain keys, then each key's models."""
    logs = {key: _mean(values[key], counted) if key in values else value for key, value in others.items()}
    for key, own in values.items():
        logs.update({f"{key}_model_{model}": value for model, value in enumerate(own)})
    return logs


def _mean(values: Sequence[float], counted: Iterable[int]) -> float:
    return float(torch.tensor(values, dtype=torch.float64)[list(counted)].mean())


def _shared(values: Sequence[Any], counts: Sequence[int]) -> Any:
    """One value for those of several batches."""
    if all(are_same(value, values[0]) for value in values):
        return values[0]
    if not all(isinstance(value, (int, float)) for value in values):
        raise differ("a metric that is no number", list(values), "the same in all")
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
