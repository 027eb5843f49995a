"""Early stopping: which models were stopped, why, and which count in means over the models."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainers.errors import TrainerError

_LOGGER = logging.getLogger(__name__)
_DIVERGED = "its loss was"


def diverged_models(early: Mapping[str, Any]) -> list[int]:
    """Return the models that were stopped because of their loss.

    Args:
        early: From `EarlyStopping.state_dict`.

    Example:
        >>> diverged_models({"best": [0.1, 0.2], "waited": [0, 1], "stopped": {1: "why"}, "diverged": [1]})
        [1]
    """
    if "diverged" in early:
        return list(early["diverged"])
    # Checkpoints of earlier versions say it in the reason only.
    return [model for model, reason in early["stopped"].items() if reason.startswith(_DIVERGED)]


class EarlyStopping:
    """Counts, for every model, the validations since its best value, and knows which models were stopped.

    Args:
        patiences: For each model, the validations in a row without a new best that stop it; None never does.
        mode: ``"min"`` or ``"max"``.

    Attributes:
        stopped: Models that were stopped, with the reason.
        diverged: Those of them whose loss was not finite.

    Example:
        >>> early = EarlyStopping([2], mode="min")
        >>> [early.update([loss]) for loss in (1.0, 0.5, 0.6, 0.5)]
        [[], [], [], [0]]
    """

    def __init__(self, patiences: Sequence[int | None], mode: str) -> None:
        self.stopped: dict[int, str] = {}
        self.diverged: set[int] = set()
        self._patiences = patiences
        self._mode = mode
        self._best: list[float | None] = [None] * len(patiences)
        self._waited = [0] * len(patiences)
        self._active = _Mask(len(patiences))
        self._counted = _Mask(len(patiences))

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
                self.stopped[model] = f"no improvement on {self._best[model]} in {self._waited[model]} validations"
                newly.append(model)
        return newly

    def all_stopped(self) -> bool:
        """Whether no model is left."""
        return len(self.stopped) == len(self._best)

    def active(self) -> Tensor | None:
        """Return ``[num_models]`` bool, the models that are left; None while none was stopped."""
        return self._active.without(self.stopped)

    def counted(self) -> Tensor | None:
        """Return ``[num_models]`` bool, the models that a mean over the models is taken over; None for all.

        They are all but the diverged ones. A model that stopped early counts on, with what it measures as it is: the
        mean is over the same models before and after, and does not get worse because a good one was ready.
        """
        return self._counted.without(self.diverged)

    def stop_diverged(self, model: int, loss: float, step: int) -> None:
        """Note that a model is stopped because of its loss.

        Args:
            model: Which.
            loss: NaN or infinite.
            step: Optimizer steps done.
        """
        self.stopped[model] = f"{_DIVERGED} {loss} after step {step}"
        self.diverged.add(model)

    def state_dict(self) -> dict[str, Any]:
        """Return bests, counts and stopped models as plain data."""
        return {
            "best": list(self._best),
            "waited": list(self._waited),
            "stopped": dict(self.stopped),
            "diverged": sorted(self.diverged),
        }

    def revived(self, state: Mapping[str, Any]) -> list[int]:
        """Return the models that were stopped in a state, and would not have been with the patience of now.

        Args:
            state: From `state_dict`.

        Example:
            >>> state = {"best": [0.5, 0.5], "waited": [2, 3], "stopped": {0: "why", 1: "why"}, "diverged": [1]}
            >>> EarlyStopping([3, 4], "min").revived(state)
            [0]
        """
        diverged = diverged_models(state)
        return [
            model
            for model in state["stopped"]
            if model not in diverged and not self._is_over(model, state["waited"][model])
        ]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; models are trained again where the patience was raised since.

        Args:
            state: From `state_dict`.

        Raises:
            TrainerError: It is of another number of models.
        """
        if len(state["best"]) != len(self._best):
            if not state["stopped"] and all(best is None for best in state["best"]):
                return  # in earlier versions, what a batch without early stopping has noted: nothing
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
        self.diverged = set(diverged_models(state))

    def _is_over(self, model: int, waited: int) -> bool:
        patience = self._patiences[model] if model < len(self._patiences) else None
        return patience is not None and waited >= patience

    def _is_better(self, value: float, best: float | None) -> bool:
        if math.isnan(value):
            return False
        return best is None or (value < best if self._mode == "min" else value > best)


class _Mask:
    """All models but some, as a tensor that is made once: it is asked for with every batch."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._without: set[int] = set()
        self._tensor: Tensor | None = None

    def without(self, models: Collection[int]) -> Tensor | None:
        """``[count]`` bool; None while there are none to be left out."""
        if not models:
            return None
        if self._tensor is None or self._without != set(models):
            self._without = set(models)
            self._tensor = torch.tensor([model not in models for model in range(self._count)])
        return self._tensor
