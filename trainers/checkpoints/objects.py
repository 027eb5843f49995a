"""Model, optimizer and schedulers of a run: loaded from a checkpoint all together, or left as they were."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainers.checkpoints.files import with_types_of
from trainers.errors import TrainerError

if TYPE_CHECKING:
    from trainers.generic import GenericTrainer

_LOGGER = logging.getLogger(__name__)
_NEW_RUN = "to begin a new run, use another folder or experiment_name"


def class_names(optimizer: Any, schedulers: Sequence[Any]) -> dict[str, Any]:
    """Return what a checkpoint says about the classes of an optimizer and its schedulers.

    Args:
        optimizer: Any; one for many models is named after the class that it is made of.
        schedulers: All there are.

    Returns:
        The name of the optimizer, and those of the schedulers in their order.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
        >>> class_names(optimizer, [torch.optim.lr_scheduler.StepLR(optimizer, 1)])
        {'optimizer': 'SGD', 'schedulers': ['StepLR']}
    """
    return {
        "optimizer": getattr(optimizer, "class_name", type(optimizer).__name__),
        "schedulers": [_scheduler_name(scheduler) for scheduler in schedulers],
    }


@contextmanager
def kept_on_failure(trainer: GenericTrainer, schedulers: Sequence[Any]) -> Iterator[None]:
    """Where something fails in the block, put model, optimizer and schedulers back to what they were.

    Until the block ends, that takes the memory of one more copy of their states, on the devices where they are.

    Args:
        trainer: That has them.
        schedulers: All there are.
    """
    # A load may fail at any point, and torch loads what fits before it raises.
    before = _copied(trainer, schedulers)
    try:
        yield
    except BaseException:
        _put_back(trainer, schedulers, before)
        raise


def apply_objects(trainer: GenericTrainer, schedulers: Sequence[Any], content: Mapping[str, Any], source: str) -> None:
    """Load model, optimizer and schedulers; to be called in `kept_on_failure`.

    Args:
        trainer: That has them.
        schedulers: All there are.
        content: Of the checkpoint.
        source: Where that is from, for errors.

    Raises:
        TrainerError: The model is of another architecture, the optimizer or a scheduler of another class or for other
            parameters, or there is another number of schedulers.
        MemoryError: There is no room for the state; ``torch.OutOfMemoryError`` on a GPU.
    """
    _check_classes(trainer, schedulers, content, source)
    if content["optimizer_state_dict"] is None:
        _LOGGER.warning("the checkpoint has no optimizer state (checkpoint.save_optimizer is off): it starts anew")
    if content["scheduler_state_dict"] is None and schedulers:
        _LOGGER.warning("the checkpoint has no scheduler state: the schedule starts anew")
    try:
        _load(trainer, schedulers, content)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TrainerError(
            f"the checkpoint {source} does not fit",
            received=f"a {type(trainer.model).__name__} and a {type(trainer.optimizer).__name__} ({' '.join(lines)})",
            expected="model, optimizer and schedulers as in the run that is continued",
            fix=f"Make them as they were; {_NEW_RUN}.",
        ) from error


def _check_classes(trainer: GenericTrainer, schedulers: Sequence[Any], content: Mapping[str, Any], source: str) -> None:
    states, saved = content["scheduler_state_dict"], content.get("classes")
    if states is not None and len(states) != len(schedulers):
        raise TrainerError(
            "schedulers at resume",
            received=f"{len(schedulers)}",
            expected=f"{len(states)}, as in the run that is continued",
        )
    # Checkpoints of earlier versions do not say it.
    if saved is None:
        return
    own = class_names(trainer.optimizer, schedulers)
    pairs = [] if content["optimizer_state_dict"] is None else [("optimizer", own["optimizer"], saved["optimizer"])]
    if states is not None:
        names = zip(own["schedulers"], saved["schedulers"], strict=True)
        pairs += [(f"scheduler {number}", *pair) for number, pair in enumerate(names)]
    for what, name, saved_name in pairs:
        if name != saved_name:
            raise TrainerError(
                f"the {what} at resume from {source}",
                received=name,
                expected=f"{saved_name}, as in the run that is continued",
                fix=f"Another class would misread the saved state: use the same one; {_NEW_RUN}, from these weights "
                "with model.load_state_dict(torch.load(FILE)['model_state_dict']).",
            )


def _scheduler_name(scheduler: Any) -> str:
    """The class, and those of the schedulers that it is made of."""
    name, parts = type(scheduler).__name__, getattr(scheduler, "_schedulers", None)
    return f"{name}({', '.join(map(_scheduler_name, parts))})" if isinstance(parts, (list, tuple)) else name


def _copied(trainer: GenericTrainer, schedulers: Sequence[Any]) -> dict[str, Any]:
    """What the objects are now, in the form of a checkpoint."""
    model = trainer.model.state_dict()
    return {
        "model_state_dict": {
            name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in model.items()
        },
        "optimizer_state_dict": copy.deepcopy(trainer.optimizer.state_dict()),
        "scheduler_state_dict": [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers],
    }


def _put_back(trainer: GenericTrainer, schedulers: Sequence[Any], before: Mapping[str, Any]) -> None:
    states = [before["model_state_dict"], before["optimizer_state_dict"], *before["scheduler_state_dict"]]
    for target, state in zip([trainer.model, trainer.optimizer, *schedulers], states, strict=True):
        try:
            target.load_state_dict(state)
        except Exception:
            # One that cannot load must not keep the others from it.
            _LOGGER.warning("a %s could not be put back to what it was", type(target).__name__, exc_info=True)


def _load(trainer: GenericTrainer, schedulers: Sequence[Any], content: Mapping[str, Any]) -> None:
    trainer.model.load_state_dict(content["model_state_dict"])
    if content["optimizer_state_dict"] is not None:
        trainer.optimizer.load_state_dict(content["optimizer_state_dict"])
    if content["scheduler_state_dict"] is not None:
        for scheduler, state in zip(schedulers, content["scheduler_state_dict"], strict=True):
            scheduler.load_state_dict(with_types_of(state, scheduler.state_dict()))
