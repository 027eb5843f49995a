"""The hooks of a trainer: methods of its own to override, and callbacks."""

from __future__ import annotations

from typing import Any

from trainers.callbacks import TrainingCallback
from trainers.errors import TrainerError
from trainers.states import ResumeState


class TrainerHooks:
    """Base of `trainers.generic.GenericTrainer`: what happens beside the training itself.

    Exceptions of hooks end the run.

    Attributes:
        callbacks: In the order added.
    """

    def __init__(self) -> None:
        self.callbacks: list[TrainingCallback] = []

    def add_callback(self, callback: TrainingCallback) -> None:
        """Add a callback; callbacks are called in the order added, after the trainer's own hook.

        Args:
            callback: To be called.

        Raises:
            TrainerError: It is no `TrainingCallback`.
        """
        if not isinstance(callback, TrainingCallback):
            raise TrainerError("add_callback", received=f"a {type(callback).__name__}", expected="a TrainingCallback")
        self.callbacks.append(callback)

    def on_training_start(self) -> None:
        """Called at the start of training, also when a run is resumed."""

    def on_training_end(self, logs: dict[str, Any]) -> None:
        """Called when training has ended regularly or was stopped; not after a preemption or an exception."""

    def on_epoch_start(self, epoch: int) -> None:
        """Called when an epoch is entered, also in its middle."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        """Called after an epoch's training, validation and scheduler step."""

    def on_batch_start(self, batch_idx: int) -> None:
        """Called before a training batch."""

    def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
        """Called after a training batch and, where one was due, the optimizer step."""

    def on_resume_from_checkpoint(self, resume_state: ResumeState) -> None:
        """Called after a checkpoint was loaded, before the run goes on."""

    def on_preemption_signal(self, signum: int, frame: Any) -> None:
        """Called before the save that a signal asked for; at a boundary, never within the signal handler.

        Args:
            signum: Of the signal; 0 after `request_preemption`.
            frame: None.
        """

    def call_hooks(self, name: str, *arguments: Any) -> None:
        """Call a hook of the trainer, then that of every callback which has it.

        Args:
            name: Of the hook.
            *arguments: Of the hook; callbacks get the trainer first.
        """
        getattr(self, name)(*arguments)
        for callback in self.callbacks:
            hook = getattr(callback, name, None)
            if hook is not None:
                hook(self, *arguments)
