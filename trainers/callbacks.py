"""The base class of what users hook into a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.generic import GenericTrainer


class TrainingCallback:
    """Hooks into a training run; override what you need.

    Exceptions of a hook end the run. A callback that has ``state_dict()`` and ``load_state_dict(state)`` is saved in
    every checkpoint and restored from it; its state may hold tensors, numbers, strings, lists and dicts.

    Example:
        >>> class Counter(TrainingCallback):
        ...     batches = 0
        ...     def on_batch_end(self, trainer, batch_idx, logs):
        ...         self.batches += 1
    """

    def on_training_start(self, trainer: GenericTrainer) -> None:
        """Called at the start of training, also when a run is resumed.

        Args:
            trainer: That trains.
        """

    def on_training_end(self, trainer: GenericTrainer, logs: dict[str, Any]) -> None:
        """Called when training has ended regularly or was stopped; not after a preemption or an exception.

        Args:
            trainer: That trained.
            logs: Of the last epoch.
        """

    def on_epoch_start(self, trainer: GenericTrainer, epoch: int) -> None:
        """Called when an epoch is entered, also in its middle.

        Args:
            trainer: That trains.
            epoch: From 0.
        """

    def on_epoch_end(self, trainer: GenericTrainer, epoch: int, logs: dict[str, Any]) -> None:
        """Called after an epoch's training, validation and scheduler step.

        Args:
            trainer: That trains.
            epoch: From 0.
            logs: Means over the epoch's batches. Changes are seen by later callbacks and saved.
        """

    def on_batch_start(self, trainer: GenericTrainer, batch_idx: int) -> None:
        """Called before a training batch.

        Args:
            trainer: That trains.
            batch_idx: From 0 in every epoch.
        """

    def on_batch_end(self, trainer: GenericTrainer, batch_idx: int, logs: dict[str, Any]) -> None:
        """Called after a training batch and, where one was due, the optimizer step.

        Args:
            trainer: That trains.
            batch_idx: From 0 in every epoch.
            logs: What the training step returned.
        """
