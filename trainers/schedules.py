"""Learning rate schedulers: one for all parameter groups, or a list with one for each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainers.config.errors import ConfigurationError
from trainers.errors import TrainerError


def as_list(scheduler: Any, interval: str) -> list[Any]:
    """Return all schedulers of a run.

    Args:
        scheduler: One, a list of them (as `OptimizerFactory.create_lr_scheduler` returns), or None.
        interval: ``"epoch"`` or ``"step"``, when they are stepped.

    Returns:
        The schedulers.

    Raises:
        TrainerError: Something in it is no scheduler, or cannot be saved.
        ConfigurationError: A plateau scheduler is to be stepped when there is no metric.
    """
    schedulers = [] if scheduler is None else list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]
    for one in schedulers:
        missing = [name for name in ("step", "state_dict", "load_state_dict") if not callable(getattr(one, name, None))]
        if missing:
            raise TrainerError(
                "scheduler",
                received=f"a {type(one).__name__} without {', '.join(missing)}",
                expected="an object with step(), state_dict() and load_state_dict()",
            )
        if isinstance(one, ReduceLROnPlateau) and interval == "step":
            raise ConfigurationError(
                "scheduler_interval: received 'step' with a ReduceLROnPlateau; expected 'epoch', when there is a metric"
            )
    return schedulers


def step_schedulers(
    schedulers: Sequence[Any],
    values: Sequence[Any] | None,
    *,
    resumed_before_first_step: bool,
    left_out: Collection[int] = (),
) -> None:
    """Step every scheduler once.

    Args:
        schedulers: All there are.
        values: What plateau schedulers watch, one value or one per scheduler; None where there was no validation, in
            which case they wait.
        resumed_before_first_step: Whether the optimizer's last step was made by the process before. torch would warn
            that schedulers are stepped before the optimizer.
        left_out: Schedulers that are not stepped: those of models that were stopped.
    """
    with warnings.catch_warnings():
        if resumed_before_first_step:
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        for index, scheduler in enumerate(schedulers):
            if index in left_out:
                continue
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
            elif values is not None:
                scheduler.step(values[index] if len(values) == len(schedulers) else values[0])


class StoppedGroups:
    """What the parameter groups of stopped models say, whatever a scheduler of all groups does.

    Args:
        optimizer: With one parameter group per model.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        # Copied once for each model: there may be many, and a scheduler may be stepped after every batch.
        self._values: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    @contextmanager
    def kept(self, models: Collection[int]) -> Iterator[None]:
        """Keep the groups of some models as they were when they were given for the first time.

        Args:
            models: Those that were stopped.
        """
        for model in models:
            if model not in self._values:
                self._values[model] = _values_of(self._optimizer.param_groups[model])
        yield
        for model in models:
            constants, others = self._values[model]
            self._optimizer.param_groups[model].update(constants)
            if others:
                self._optimizer.param_groups[model].update(copy.deepcopy(others))


def _values_of(group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a parameter group, what cannot be changed in place, and copies of the rest: tensors, say."""
    values = {name: value for name, value in group.items() if name != "params"}
    constants = {name: value for name, value in values.items() if _is_constant(value)}
    return constants, copy.deepcopy({name: value for name, value in values.items() if name not in constants})


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str))
