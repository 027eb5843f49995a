"""Whether, after a signal, Slurm is asked to start the job again."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence

from trainers.preemption.signals import (
    is_at_its_time_limit,
    is_being_preempted,
    job_facts,
    requeue,
    slurm_job_id,
)
from trainers.ranks import is_first_of_job
from trainers.settings import GenericTrainerConfig

_LOGGER = logging.getLogger(__name__)
# How long Slurm may take to answer before the save; what is left of the job may be short.
_SECONDS_BEFORE_THE_SAVE = 3.0


class RequeueDecision:
    """What follows from the signals that came; made before the save, carried out after it.

    Args:
        config: Of the trainer.
        signals: Numbers of the signals; 0 for `request_preemption`.
        count: How often the run was requeued before.
        has_advanced: Whether this process has made an optimizer step.

    Attributes:
        counts: 1 in the job's first process if the requeue counts against ``max_preemptions``, else 0. One at the time
            limit does not where the run has advanced: such a run comes to its end. What Slurm says of that too late for
            the save is known after `confirm`.
        leaves_run: Whether the run is to be left.

    Example:
        >>> RequeueDecision(GenericTrainerConfig(), [signal.SIGUSR1], 0, True).carry_out()  # outside Slurm
        False
    """

    def __init__(self, config: GenericTrainerConfig, signals: Sequence[int], count: int, has_advanced: bool) -> None:
        self._job_id = slurm_job_id() if config.requeue_job else None
        requeue_numbers = {0, *config.requeue_numbers()}
        self._is_certain = any(number in requeue_numbers for number in signals)
        # Its meaning is known from Slurm only, which is asked after the save: little time is left.
        self._may_be_cancelled = not self._is_certain and signal.SIGTERM in signals
        self._is_wanted = self._job_id is not None and (self._is_certain or self._may_be_cancelled)
        self._is_used_up = self._is_wanted and count >= config.max_preemptions
        self.leaves_run = not self._is_used_up or config.preemption.exit_on_max_preemptions
        self.counts = int(self._is_wanted and not self._is_used_up and is_first_of_job())
        self._limit = config.max_preemptions
        self._is_to_be_asked_again = False
        if self.counts and self._is_certain and has_advanced:
            assert self._job_id is not None
            facts = job_facts(self._job_id, seconds=_SECONDS_BEFORE_THE_SAVE)
            self.counts = int(not is_at_its_time_limit(facts))
            self._is_to_be_asked_again = not facts

    def carry_out(self) -> bool:
        """Requeue the job if that was decided, where nothing is to be saved in between: `confirm` and `requeue`.

        Returns:
            Whether Slurm accepted.
        """
        return self.confirm() and self.requeue()

    def confirm(self) -> bool:
        """Ask Slurm what there was no time for before the save; ``counts`` is right from then on.

        Returns:
            Whether the job is to be requeued, by this process: the job's first.
        """
        if self._is_used_up:
            _LOGGER.error(
                "the run was requeued %d times, which is max_preemptions: it was saved and is not requeued", self._limit
            )
            return False
        if not self._is_wanted or not is_first_of_job():
            return False
        assert self._job_id is not None
        if self._may_be_cancelled and not is_being_preempted(job_facts(self._job_id)):
            _LOGGER.info("SIGTERM without a preemption: job %s was cancelled and is not requeued", self._job_id)
            return False
        if self._is_to_be_asked_again:
            self.counts = int(not is_at_its_time_limit(job_facts(self._job_id)))
        return True

    def requeue(self) -> bool:
        """Requeue the job, after `confirm` has said so; Slurm may end it at once.

        Returns:
            Whether Slurm accepted.
        """
        assert self._job_id is not None
        return requeue(self._job_id)
