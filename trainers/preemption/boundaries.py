"""The places at which a run may be left: whether a signal has come, and what is done then."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from trainers.preemption.requeueing import RequeueDecision
from trainers.ranks import agreed
from trainers.training import device_of

if TYPE_CHECKING:
    from trainers.generic import GenericTrainer

_LOGGER = logging.getLogger(__name__)


class Preempted(Exception):
    """Leaves the loop: the run was saved and ends here for now."""


class Boundaries:
    """What is looked at wherever a checkpoint can be written.

    Args:
        trainer: That trains.
    """

    def __init__(self, trainer: GenericTrainer) -> None:
        self.trainer = trainer
        self._last_save = time.monotonic()
        # Found once: it is needed after every step.
        self._device = device_of(trainer.model)

    def was_saved(self) -> None:
        """Start counting the minutes to the next save."""
        self._last_save = time.monotonic()

    def leave_if_asked(self, *, is_busy: bool = False) -> bool:
        """Save and leave if a signal has come, on all ranks alike; ``stop_training`` of one rank stops all.

        Args:
            is_busy: Whether this process may have more to do before the ranks meet again.

        Returns:
            Whether any process is busy.

        Raises:
            Preempted: After a signal.
            KeyboardInterrupt: After Ctrl-C.
        """
        flags, stops = self.trainer.signal_flags, bool(self.trainer.stop_training)
        asked = [int(flags.interrupted), int(bool(flags.received)), int(stops), int(is_busy)]
        interrupted, requested, stopped, busy = agreed(asked, self._device)
        self.trainer.stop_training = bool(stopped)
        if interrupted:
            self.trainer.save_checkpoint(emergency=True)
            raise KeyboardInterrupt("the run was saved and can be resumed")
        if requested and self._handle_preemption():
            raise Preempted
        return bool(busy)

    def minutes_are_over(self) -> bool:
        """Whether it is time for the next save, on all ranks alike."""
        minutes = self.trainer.config.save_every_n_minutes
        if minutes is None:
            return False
        is_over = time.monotonic() - self._last_save >= 60 * minutes
        return bool(agreed([int(is_over)], self._device)[0])

    def _handle_preemption(self) -> bool:
        """Save, and have Slurm start the job again, after a signal has come.

        Returns:
            Whether the run is to be left; false where it goes on until it is killed.
        """
        trainer = self.trainer
        signals = list(trainer.signal_flags.received) or [0]
        trainer.signal_flags.clear()
        decision = RequeueDecision(trainer.config, signals, trainer.preemption_count, trainer.has_advanced)
        counts, leaves_run = agreed([decision.counts, int(decision.leaves_run)], self._device)
        trainer.preemption_count += counts
        trainer.call_hooks("on_preemption_signal", signals[0], None)
        is_saving = trainer.config.preemption.checkpoint_on_preemption
        # Only the first rank knows what became of a save in the background.
        if is_saving and agreed([int(not trainer.is_saved_here())], self._device)[0]:
            trainer.save_checkpoint(emergency=True)
        # Where Slurm has answered after the save, the file must not say otherwise; before the requeue, which may end
        # the job at once.
        is_confirmed = decision.confirm()
        (right_counts,) = agreed([decision.counts if is_confirmed else 0], self._device)
        self._correct_count(right_counts - counts)
        trainer.requeued = bool(agreed([int(is_confirmed and decision.requeue())], self._device)[0])
        if not trainer.requeued:
            # Nobody will start the job again.
            self._correct_count(-right_counts)
        trainer.preempted = bool(leaves_run)
        return trainer.preempted

    def _correct_count(self, difference: int) -> None:
        """Save again, with another count of requeues, if it is another."""
        if not difference:
            return
        self.trainer.preemption_count += difference
        if not self.trainer.config.preemption.checkpoint_on_preemption:
            return
        try:
            self.trainer.save_checkpoint(emergency=True)
        except Exception:
            # The run was saved, and a wrong count is no reason to lose it. The ranks come here together.
            _LOGGER.warning(
                "the run was saved, but its preemption_count could not be corrected there: it may differ by one",
                exc_info=True,
            )
