"""A look at an experiment's first batch that leaves the order of its data as it was."""

from __future__ import annotations

from typing import Any

from trainers.built import Built
from trainers.errors import TrainerError
from trainers.loaders.processes import can_fork
from trainers.loaders.resumable import make_resumable
from trainers.states import capture_rng_state, restore_rng_state
from trainers.training import as_pair, device_of


def first_batch(built: Built) -> tuple[Any, Any]:
    """Return inputs and targets of one training batch, on the model's device.

    Args:
        built: The experiment.

    Raises:
        trainers.errors.TrainerError: There is no batch, or it is no pair.

    Example:
        >>> import torch
        >>> inputs, targets = first_batch(Built(torch.nn.Linear(4, 2), torch.nn.functional.mse_loss, [(1, 2), (3, 4)]))
        >>> inputs, targets
        (1, 2)
    """
    loader = make_resumable(built.train, "train", can_fork=can_fork(built.model))
    generators, before = capture_rng_state(), loader.state_dict()
    try:
        batch = next(loader.start(), None)
    finally:
        loader.close()
        loader.restore_generators(before)
        restore_rng_state(generators)
    if batch is None:
        raise TrainerError("train", received="a loader without batches", expected="at least one batch")
    return as_pair(batch, device_of(built.model))
