"""Successive halving: which models go on, and after how many epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainers.config.errors import ValidationError, problem
from trainers.config.modes import sign_of


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving: every few epochs the better part of the models goes on, the rest is dropped.

    See Jamieson and Talwalkar (2016), "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
    arXiv:1502.07943.

    Attributes:
        every_n_epochs: Epochs between two selections.
        keep: Fraction of the models that goes on, rounded up.
        metric: By which models are compared, a key of the trainer's metrics.
        mode: ``"min"`` or ``"max"``.
        at_least: How many models are never fallen below.

    Raises:
        ValidationError: A value is out of range.

    Example:
        >>> [Halving(every_n_epochs=2).survivors(count) for count in (64, 3, 1)]
        [32, 2, 1]
    """

    every_n_epochs: int
    keep: float = 0.5
    metric: str = "val_loss"
    mode: str = "min"
    at_least: int = 1

    def __post_init__(self) -> None:
        problems = []
        for name in ("every_n_epochs", "at_least"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                problems.append(problem(name, getattr(self, name), "a whole number >= 1"))
        if not isinstance(self.keep, (int, float)) or not 0 < self.keep < 1:
            problems.append(problem("keep", self.keep, "more than 0 and less than 1"))
        if self.mode not in ("min", "max"):
            problems.append(problem("mode", self.mode, "'min' or 'max'"))
        if problems:
            raise ValidationError(problems, "Halving")

    def survivors(self, count: int) -> int:
        """Return how many of ``count`` models go on.

        Args:
            count: Models that are left.
        """
        # Rounded first: 0.07 of 100 is 7.000000000000001 in floating point.
        return max(math.ceil(round(count * self.keep, 9)), min(self.at_least, count))

    def chosen(self, values: Mapping[str, float]) -> list[str]:
        """Return the models that go on, in the given order.

        Args:
            values: Of the metric, by model; without a finite value a model is the worst, and of equals the last.

        Example:
            >>> Halving(every_n_epochs=1).chosen({"a": 0.3, "b": 0.1, "c": float("nan"), "d": 0.2})
            ['b', 'd']
        """
        best_first = ranked(values, self.mode)
        rest = [model for model in values if model not in best_first]
        going_on = [*best_first, *rest][: self.survivors(len(values))]
        return [model for model in values if model in going_on]


def ranked(values: Mapping[str, float], mode: str) -> list[str]:
    """Return the models with finite values, the best first; of equals the first.

    Args:
        values: By model.
        mode: ``"min"`` or ``"max"``.

    Raises:
        ConfigurationError: There is no such mode.

    Example:
        >>> ranked({"a": 0.5, "b": float("nan"), "c": 0.1}, "min")
        ['c', 'a']
    """
    sign = sign_of(mode)
    finite = {model: sign * value for model, value in values.items() if math.isfinite(value)}
    return sorted(finite, key=lambda model: finite[model])
