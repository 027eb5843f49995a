"""Errors of the trainer; all of them are `TrainerError` and belong to the library's one family."""

from __future__ import annotations

from mb_torch import ModelBatchError


class TrainerError(ModelBatchError, RuntimeError):
    """Training cannot go on, or a checkpoint cannot be written or used.

    Example:
        >>> str(TrainerError("training_step", received="a float", expected="a dict with the key 'loss'"))
        "training_step: received a float; expected a dict with the key 'loss'"
    """


class MissingCheckpointError(TrainerError, FileNotFoundError):
    """There is no checkpoint to load; it is also a ``FileNotFoundError``."""


class DamagedCheckpointError(TrainerError):
    """A checkpoint file is truncated, altered, or holds something other than a checkpoint."""


class CheckpointTimeoutError(TrainerError, TimeoutError):
    """An ordinary save took longer than ``checkpoint.timeout_seconds``; no file was written."""


class PreemptionTimeoutError(TrainerError, TimeoutError):
    """The save on preemption took longer than ``preemption.timeout_minutes``; no file was written."""
