"""One learning rate scheduler per model, each moving its own parameter group only.

A scheduler of ``torch.optim`` moves every group of the optimizer it is given. Here it is given a `GroupView`,
an optimizer that has one group: the i-th of the real optimizer, looked up at every access because
``Optimizer.load_state_dict`` replaces the groups.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch.optim import Optimizer

from mb_torch.configs import call_with_config, check_configs
from mb_torch.errors import InvalidInput, Unsupported


def create_lr_scheduler(optimizer: Optimizer, scheduler_cls: type, configs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return a list of schedulers, one per parameter group.

    Step each of them once per epoch (or step), a ``ReduceLROnPlateau`` with its model's own metric. To
    resume, load optimizer and schedulers in either order, before or after making the schedulers.

    For ``SequentialLR`` and ``ChainedScheduler`` a configuration gives ``schedulers`` as a list of pairs
    ``(scheduler_cls, options)``, or of functions that make a scheduler from an optimizer.

    Args:
        optimizer: One with a parameter group per model.
        scheduler_cls: A class like ``torch.optim.lr_scheduler.StepLR``.
        configs: One dict of the scheduler's options per model.

    Returns:
        ``len(configs)`` schedulers.

    Raises:
        InvalidInput: Wrong number of configurations, or one that is refused (the error names the model; all
            groups are then as they were).

    Example:
        >>> import torch
        >>> from torch.optim.lr_scheduler import ExponentialLR
        >>> groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0} for _ in range(2)]
        >>> optimizer = torch.optim.SGD(groups)
        >>> schedulers = create_lr_scheduler(optimizer, ExponentialLR, [{"gamma": 0.5}, {"gamma": 0.1}])
        >>> optimizer.step()
        >>> for scheduler in schedulers:
        ...     scheduler.step()
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.5, 0.1]
    """
    if not isinstance(optimizer, Optimizer):
        raise InvalidInput("create_lr_scheduler", received=type(optimizer).__name__, expected="a torch.optim.Optimizer")
    own = check_configs(configs, len(optimizer.param_groups), "scheduler configs")
    watch = _StepWatch(optimizer)
    before = [dict(group) for group in optimizer.param_groups]
    try:
        return [
            _build(f"model {index}", scheduler_cls, config, GroupView(optimizer, index, watch))
            for index, config in enumerate(own)
        ]
    except Exception:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.clear()
            group.update(values)
        raise


def _build(where: str, scheduler_cls: Any, config: Mapping[str, Any], view: GroupView) -> Any:
    """Make one scheduler, with the schedulers it is made of."""
    if not isinstance(scheduler_cls, type):
        raise InvalidInput(f"{where}: scheduler", received=repr(scheduler_cls), expected="a scheduler class")
    options = dict(config)
    if "schedulers" in options:
        if isinstance(options["schedulers"], str) or not isinstance(options["schedulers"], Sequence):
            raise InvalidInput(f"{where}: schedulers", received=options["schedulers"], expected="a list")
        options["schedulers"] = [_build_part(where, part, view) for part in options["schedulers"]]
        if next(iter(inspect.signature(scheduler_cls).parameters), None) == "schedulers":
            options["optimizer"] = view
            return call_with_config(where, _resumable(scheduler_cls), (), options)
    return call_with_config(where, _resumable(scheduler_cls), (view,), options)


def _build_part(where: str, part: Any, view: GroupView) -> Any:
    if isinstance(part, Sequence) and len(part) == 2 and isinstance(part[1], Mapping):
        return _build(where, part[0], part[1], view)
    if callable(part):
        return call_with_config(where, part, (view,), {})
    raise InvalidInput(
        f"{where}: entry of schedulers",
        received=repr(part),
        expected="(scheduler_cls, options), or a function that makes a scheduler from an optimizer",
        fix="A finished scheduler moves the groups of all models.",
    )


class _StepWatch:
    """Whether the optimizer has been stepped since the schedulers were made.

    A fused training step does not call ``optimizer.step()``; such optimizers count their updates.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._updates_at_start: int | None = getattr(optimizer, "updates_done", None)
        self._stepped = False
        if self._updates_at_start is None:
            optimizer.register_step_post_hook(self._mark)

    def _mark(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True

    def stepped(self) -> bool:
        if self._updates_at_start is None:
            return self._stepped
        return bool(self._optimizer.updates_done != self._updates_at_start)  # type: ignore[attr-defined]


class GroupView(Optimizer):
    """An optimizer seen by one scheduler: a single parameter group of the real one.

    Args:
        optimizer: The real optimizer.
        index: Which of its groups.
        watch: Knows whether the real optimizer was stepped.
    """

    def __init__(self, optimizer: Optimizer, index: int, watch: _StepWatch) -> None:
        self._optimizer = optimizer
        self._index = index
        self._watch = watch
        group = optimizer.param_groups[index]
        self._group_at_start = group
        # A group that has been scheduled before may come from a checkpoint. Making a scheduler sets it to the
        # start of the schedule; loading the scheduler's state brings it back.
        self._values_at_start = {key: value for key, value in group.items() if key != "params"}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The group, as the real optimizer has it now."""
        return [self._optimizer.param_groups[self._index]]

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The real optimizer's default options."""
        return self._optimizer.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The real optimizer's state."""
        return self._optimizer.state

    @property
    def _opt_called(self) -> bool:
        """What torch's schedulers ask before they warn about the order of steps."""
        return self._watch.stepped()

    def step(self, closure: Any = None) -> NoReturn:
        """Raise `Unsupported`: models are stepped together."""
        raise Unsupported("a scheduler's optimizer is one group of the real one", fix="Step the real optimizer.")

    # Tells torch's schedulers that calls of step() are watched, so that they do not replace it.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def restore_loaded_values(self) -> None:
        """Undo what making a scheduler did to a group that had been loaded before."""
        group = self.param_groups[0]
        if group is self._group_at_start and "initial_lr" in self._values_at_start and not self._opt_called:
            group.update(self._values_at_start)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@functools.cache
def _resumable(scheduler_cls: type) -> type:
    """Derive a class whose `load_state_dict` also works on an optimizer that was loaded first."""
    if not hasattr(scheduler_cls, "load_state_dict"):
        return scheduler_cls

    class Resumable(scheduler_cls):  # type: ignore[misc]
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Load the state; see the base class."""
            super().load_state_dict(state_dict)
            if isinstance(self.optimizer, GroupView):
                self.optimizer.restore_loaded_values()

        def __reduce_ex__(self, protocol: Any) -> Any:
            # The class exists in this process only: pickles name the class it is derived from.
            function, arguments, *rest = super().__reduce_ex__(protocol)
            return (_new, (scheduler_cls, function, arguments[1:]), *rest)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Resumable, name, getattr(scheduler_cls, name))
    return Resumable


def _new(scheduler_cls: type, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Rebuild a scheduler from a pickle or for a copy."""
    return function(_resumable(scheduler_cls), *arguments)
