"""The one training loop: epochs, batches, validations, and the boundaries between them at which a run can be left.

A run is left only where nothing is half done: before the first batch, after an optimizer step, after a validation batch
and between epochs. Whatever is drawn, counted or updated in between is part of the saved state, so that a run that goes
on from there ends like one that was never left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from trainers.errors import TrainerError
from trainers.loaders.resumable import ResumableLoader
from trainers.preemption.boundaries import Boundaries
from trainers.ranks import failing_together, gathered_from_ranks, is_distributed
from trainers.reporting.early_stopping import EarlyStopping
from trainers.reporting.loggers import MetricLogger
from trainers.reporting.metrics import MetricSums, description
from trainers.reporting.progress import Progress
from trainers.reporting.results import Results
from trainers.states import (
    ResumeState,
    RNGState,
    TrainerPhase,
    TrainMicroState,
    ValMicroState,
    capture_rng_state,
    restore_rng_state,
)
from trainers.training import Training, evaluating

if TYPE_CHECKING:
    from trainers.generic import GenericTrainer

_LOGGER = logging.getLogger(__name__)

_IN_VALIDATION = (TrainerPhase.VAL_START_EPOCH, TrainerPhase.VAL_BATCH_END)
_NO_BATCH = object()
_BETWEEN_EPOCHS = (TrainerPhase.EPOCH_END, TrainerPhase.TRAINING_COMPLETE)


class _CutShort(Exception):
    """Leaves the loop in the middle of an epoch: the run is over."""


class TrainingLoop:
    """One call of ``fit``.

    Args:
        trainer: Whose hooks, step functions and counters are used.
        training: How a batch trains.
        train_loader: Training batches.
        val_loader: Validation batches; None for no validation.
        schedulers: All that are to be stepped.

    Attributes:
        early_stopping: Of the models.
        loggers: Where metrics go.
        results: What is made of an epoch's metrics.
        boundaries: Where the run may be left.
        epoch_start_rng: The generators when the running epoch or validation began.
        train_is_over: Whether the running epoch has no training batch left.
        val_is_over: Whether the running validation has no batch left; other ranks may have some.
    """

    def __init__(
        self,
        trainer: GenericTrainer,
        training: Training,
        train_loader: ResumableLoader,
        val_loader: ResumableLoader | None,
        schedulers: list[Any],
    ) -> None:
        self.trainer = trainer
        self.training = training
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.schedulers = schedulers
        self.early_stopping = EarlyStopping(training.patiences, trainer.config.early_stopping_mode)
        self.loggers: list[MetricLogger] = []
        self.results = Results(trainer, self)
        self.boundaries = Boundaries(trainer)
        self.epoch_start_rng: RNGState | None = None
        self.train_is_over = self.val_is_over = False
        self._sums = MetricSums(training.num_models)
        self._val_sums = MetricSums(training.num_models)
        self._batch_idx = 0
        self._val_batch_idx = 0
        self._is_cut_short = False
        # Whether loaders and generators are where the counters say; in a resumed run they are later.
        self._is_in_place = False
        self._left_out: set[str] = set()

    def run(self, start: ResumeState | None, loader_state: Mapping[str, Any] | None) -> None:
        """Train from the beginning, or from where a checkpoint was written, to the end.

        Args:
            start: Position in the checkpoint; None begins.
            loader_state: Of the same checkpoint.

        Raises:
            trainers.preemption.boundaries.Preempted: The run was saved and left.
        """
        resume = None if start is None or loader_state is None else (start, loader_state)
        self._is_in_place = resume is None
        trainer, config = self.trainer, self.trainer.config
        first = 0
        if resume is not None:
            state, _ = resume
            is_between = state.phase in _BETWEEN_EPOCHS and state.train is None
            first = state.epoch + 1 if is_between else state.epoch
            if is_between:
                self._restore_between_epochs(resume)
                resume = None
        try:
            for epoch in range(first, config.max_epochs):
                # The rest of a resumed epoch may be a validation.
                if resume is None and self._is_over():
                    # Ended by a hook before anything was trained: the first epoch is still to come.
                    self._is_cut_short = start is None and epoch == first
                    break
                trainer.current_epoch = epoch
                self._epoch(epoch, resume)
                resume = None
        except _CutShort:
            self._is_cut_short = True
        self._complete()

    def resume_state(self) -> ResumeState:
        """Return where the run is; only at a boundary.

        Raises:
            TrainerError: Something is half done.
        """
        trainer, phase = self.trainer, self.trainer.current_phase
        in_epoch = phase in (TrainerPhase.TRAIN_BATCH_END, *_IN_VALIDATION) or self._is_cut_short
        is_boundary = in_epoch or phase in (TrainerPhase.TRAIN_START_EPOCH, *_BETWEEN_EPOCHS)
        if self.training.micro_step or not is_boundary or not self._is_in_place:
            raise TrainerError(
                "a checkpoint cannot be saved now",
                received=f"phase {phase.value} with {self.training.micro_step} batches of an incomplete accumulation"
                + ("" if self._is_in_place else ", before the run was back at its place"),
                expected="the end of a batch with an optimizer step, of a validation batch or of an epoch",
                fix="Call save_checkpoint() in on_batch_end or on_epoch_end.",
            )
        train = val = None
        if in_epoch:
            train = TrainMicroState(
                self._batch_idx, 0, self._sums.loss_sum(), self._sums.num_samples, self._sums.state_dict()
            )
        if phase in _IN_VALIDATION:
            sums = self._val_sums
            val = ValMicroState(self._val_batch_idx, sums.loss_sum(), sums.state_dict(), sums.num_samples)
        rng = capture_rng_state() if trainer.config.save_rng_state else None
        return ResumeState(
            phase, trainer.current_epoch, trainer.global_step, train=train, val=val, rng=rng, timestamp=time.time()
        )

    def has_all_logs(self, epoch: int) -> bool:
        """Whether the logs at the end of an epoch have every key that there is: those of a validation come not always.

        Args:
            epoch: From 0.
        """
        return self.val_loader is None or (epoch + 1) % self.trainer.config.validate_every_n_epochs == 0

    def batches_per_epoch(self) -> int | None:
        """How many training batches an epoch has; None where that is unknown."""
        return _length(self.train_loader)

    def close(self) -> None:
        """Let loader processes and log files go; the state of the run can still be saved."""
        for loader in (self.train_loader, self.val_loader):
            if loader is not None:
                loader.close()
        for logger in self.loggers:
            logger.close()

    def _epoch(self, epoch: int, resume: tuple[ResumeState, Mapping[str, Any]] | None) -> None:
        trainer = self.trainer
        self._sums, self._batch_idx, self.train_is_over = MetricSums(self.training.num_models), 0, False
        trainer.set_phase(TrainerPhase.TRAIN_START_EPOCH)
        # Before the hook, in which a program may tell its samplers something else.
        for loader in (self.train_loader, self.val_loader):
            if loader is not None:
                loader.set_epoch(epoch)
        trainer.call_hooks("on_epoch_start", epoch)
        in_validation = resume is not None and resume[0].phase in _IN_VALIDATION
        if resume is not None and resume[0].train is not None:
            micro = resume[0].train
            self._sums.load_state_dict(micro.additional_metrics, micro.num_samples)
            self._batch_idx = micro.batch_idx
        if not in_validation:
            self._train(self._start_training(resume))
        self._val_sums = MetricSums(self.training.num_models)
        if self.val_loader is not None and self.has_all_logs(epoch):
            self._validate(resume if in_validation else None)
        self._finish_epoch(epoch)

    def _start_training(self, resume: tuple[ResumeState, Mapping[str, Any]] | None) -> Iterator[Any]:
        """Batches of the epoch, or those that are left of it."""
        batches: Iterator[Any] | None = None
        if resume is not None:
            state, loaders = resume
            if self.val_loader is not None and loaders["val"] is not None:
                self.val_loader.restore_generators(loaders["val"])
            is_at_start = state.train is None or not state.train.batch_idx
            if is_at_start or loaders["train_is_over"]:
                self.train_loader.restore_generators(loaders["train"])
            if loaders["train_is_over"]:
                self.train_is_over, batches = True, iter(())
            elif state.train is not None and not is_at_start:
                self.epoch_start_rng = _rng(loaders["epoch_start_rng"])
                batches = self.train_loader.resume(loaders["train"], self.epoch_start_rng, state.train.batch_idx)
            if not is_at_start:
                self.trainer.set_phase(TrainerPhase.TRAIN_BATCH_END)
            if state.rng is not None:
                restore_rng_state(state.rng)
            self._is_in_place = True
        self._boundary()
        if batches is None:
            self.epoch_start_rng = capture_rng_state() if self.trainer.config.save_rng_state else None
            batches = self.train_loader.start()
        return batches

    def _train(self, batches: Iterator[Any]) -> None:
        trainer, training = self.trainer, self.training
        title = f"epoch {trainer.current_epoch}"
        with self._progress(title, self.train_loader, self._batch_idx) as progress:
            while True:
                trainer.set_phase(TrainerPhase.TRAIN_BATCH_LOAD)
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                if self._is_over() and not training.micro_step and self._batch_idx == _length(self.train_loader):
                    _LOGGER.warning(
                        "train_loader has more batches than the %d that its length says: the run ends in the middle "
                        "of an epoch, and one that goes on from there may miss a batch",
                        self._batch_idx,
                    )
                    raise _CutShort
                trainer.call_hooks("on_batch_start", self._batch_idx)
                result = training.train_batch(batch, self._batch_idx)
                if result.has_stepped:
                    self._count_step()
                if result.is_skipped:
                    value = result.logs["loss"].detach().tolist()
                    _LOGGER.warning(
                        "epoch %d: batch %d is skipped: its loss is %s", trainer.current_epoch, self._batch_idx, value
                    )
                else:
                    self._sums.add(result.logs, self.early_stopping.counted())
                self._sums.num_samples += _num_samples(batch)
                self._batch_idx += 1
                if self._batch_idx == 1 and not result.is_skipped:
                    self._warn_of_left_out("training_step", result.logs, self._sums)
                trainer.set_phase(TrainerPhase.TRAIN_BATCH_END)
                if progress.is_shown:
                    progress.advance(self._sums.means())
                trainer.call_hooks("on_batch_end", self._batch_idx - 1, result.logs)
                if result.has_stepped:
                    self.results.report_step(result.logs)
                if not training.micro_step:
                    self._boundary(has_stepped=result.has_stepped)
        self.train_is_over = True
        if not self._batch_idx:
            raise TrainerError("train_loader", received="no batch in an epoch", expected="at least one")
        has_stepped = training.flush()
        if has_stepped:
            self._count_step()
            trainer.set_phase(TrainerPhase.TRAIN_BATCH_END)
            self._boundary(has_stepped=True)

    def _validate(self, resume: tuple[ResumeState, Mapping[str, Any]] | None) -> None:
        trainer = self.trainer
        assert self.val_loader is not None
        trainer.set_phase(TrainerPhase.VAL_START_EPOCH)
        self._val_batch_idx, self.val_is_over = 0, False
        batches: Iterator[Any] | None = None
        if resume is not None:
            state, loaders = resume
            self.train_is_over = True
            self.train_loader.restore_generators(loaders["train"])
            if state.val is not None and state.val.batch_idx:
                self._val_sums.load_state_dict(state.val.metrics, state.val.num_samples)
                self._val_batch_idx = state.val.batch_idx
                self.epoch_start_rng = _rng(loaders["epoch_start_rng"])
                # Checkpoints of earlier versions do not say it.
                self.val_is_over = loaders.get("val_is_over", False)
                if self.val_is_over:
                    self.val_loader.restore_generators(loaders["val"])
                    batches = iter(())
                else:
                    batches = self.val_loader.resume(loaders["val"], self.epoch_start_rng, state.val.batch_idx)
                trainer.set_phase(TrainerPhase.VAL_BATCH_END)
            else:
                self.val_loader.restore_generators(loaders["val"])
            if state.rng is not None:
                restore_rng_state(state.rng)
            self._is_in_place = True
            self.boundaries.leave_if_asked()
        if batches is None:
            self.epoch_start_rng = capture_rng_state() if trainer.config.save_rng_state else None
            batches = self.val_loader.start()
        with (
            evaluating(trainer.model),
            self._progress("validation", self.val_loader, self._val_batch_idx) as progress,
        ):
            while True:
                trainer.set_phase(TrainerPhase.VAL_BATCH_LOAD)
                # Not asked again after its end: it might start over.
                batch = _NO_BATCH if self.val_is_over else next(batches, _NO_BATCH)
                self.val_is_over = batch is _NO_BATCH
                if batch is _NO_BATCH and not is_distributed():
                    break
                if batch is not _NO_BATCH:
                    self._validate_batch(batch)
                trainer.set_phase(TrainerPhase.VAL_BATCH_END)
                if progress.is_shown and batch is not _NO_BATCH:
                    progress.advance(self._val_sums.means())
                # The ranks meet after every batch, so one without any left waits for the others.
                if not self.boundaries.leave_if_asked(is_busy=batch is not _NO_BATCH):
                    break
        with failing_together():
            if not self._val_batch_idx:
                raise TrainerError("val_loader", received="no batch in a validation", expected="at least one, or None")

    def _validate_batch(self, batch: Any) -> None:
        trainer = self.trainer
        trainer.set_phase(TrainerPhase.VAL_BATCH_FORWARD)
        with self.training.precision():
            logs = trainer.validation_step(batch, self._val_batch_idx)
        if not isinstance(logs, Mapping):
            raise TrainerError("validation_step", received=f"a {type(logs).__name__}", expected="a dict")
        self._val_sums.add(logs, self.early_stopping.counted())
        self._val_sums.num_samples += _num_samples(batch)
        self._val_batch_idx += 1
        if self._val_batch_idx == 1:
            self._warn_of_left_out("validation_step", logs, self._val_sums)

    def _warn_of_left_out(self, step: str, logs: Mapping[str, Any], sums: MetricSums) -> None:
        """Say once which values are no metrics; texts and None are not meant to be."""
        kept = sums.means()
        for key, value in logs.items():
            if key not in kept and key not in self._left_out and not isinstance(value, str | None):
                self._left_out.add(key)
                expected = "a number or a tensor of one element" + (
                    "" if self.training.num_models is None else " or of one per model"
                )
                _LOGGER.warning(
                    "%s: %r is left out of the metrics: received %s; expected %s",
                    step,
                    key,
                    description(value),
                    expected,
                )

    def _finish_epoch(self, epoch: int) -> None:
        trainer, config = self.trainer, self.trainer.config
        logs = self.results.of_epoch(self._sums, self._val_sums)
        try:
            self.results.act_on(logs, has_all=self.has_all_logs(epoch))
        except TrainerError as error:
            if self._sums.means():
                raise
            raise TrainerError(
                f"epoch {epoch} has no metrics of its training",
                received=f"{self._batch_idx} batches, all of them skipped because their loss was not finite",
                expected="at least one that trains",
                fix="Look at the data and the loss.",
            ) from error
        if config.on_nan_loss == "skip" and not self._sums.means():
            _LOGGER.warning("epoch %d has trained nothing: all of its %d batches were skipped", epoch, self._batch_idx)
        trainer.set_phase(TrainerPhase.EPOCH_END)
        trainer.logs = logs
        trainer.call_hooks("on_epoch_end", epoch, logs)
        self.results.report(logs)
        # A hook of one rank may have asked for the end.
        trainer.stop_training = any(gathered_from_ranks(bool(trainer.stop_training)))
        is_last = epoch + 1 == config.max_epochs or self._is_over()
        # The save at the end says that the run is complete, and has the same name.
        if not is_last or not config.checkpoint.save_last:
            interval = config.save_every_n_epochs
            if (interval is not None and (epoch + 1) % interval == 0) or self.boundaries.minutes_are_over():
                trainer.save_checkpoint()

    def _complete(self) -> None:
        trainer = self.trainer
        trainer.set_phase(TrainerPhase.TRAINING_COMPLETE)
        # Where the epochs were lowered below that of the checkpoint, it is still the last one.
        if trainer.config.checkpoint.save_last and self._is_in_place:
            trainer.save_checkpoint()
        trainer.call_hooks("on_training_end", trainer.logs)

    def _boundary(self, *, has_stepped: bool = False) -> None:
        """Save, leave or stop where a checkpoint can be written."""
        trainer, config = self.trainer, self.trainer.config
        self.boundaries.leave_if_asked()
        interval = config.save_every_n_steps
        is_due = interval is not None and trainer.global_step % interval == 0
        if has_stepped and (self.boundaries.minutes_are_over() or is_due):
            trainer.save_checkpoint()
        if trainer.stop_training:
            raise _CutShort
        # With the last batch of an epoch the epoch is finished first.
        if self._is_over() and not self.train_is_over and self._batch_idx != _length(self.train_loader):
            raise _CutShort

    def _is_over(self) -> bool:
        trainer = self.trainer
        steps = trainer.config.max_steps
        return (
            trainer.stop_training
            or (steps is not None and trainer.global_step >= steps)
            or self.early_stopping.all_stopped()
        )

    def _count_step(self) -> None:
        trainer = self.trainer
        trainer.global_step += 1
        self.results.count_step()

    def _restore_between_epochs(self, resume: tuple[ResumeState, Mapping[str, Any]]) -> None:
        state, loaders = resume
        self.train_loader.restore_generators(loaders["train"])
        if self.val_loader is not None and loaders["val"] is not None:
            self.val_loader.restore_generators(loaders["val"])
        if state.rng is not None:
            restore_rng_state(state.rng)
        self._is_in_place = True

    def _progress(self, title: str, loader: ResumableLoader, done: int) -> Progress:
        return Progress(title, _length(loader), done, is_wanted=self.trainer.config.logging.console_log)


def _length(loader: ResumableLoader) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _num_samples(batch: Any) -> int:
    """Length of the first tensor of a batch; 0 if there is none."""
    leaves = pytree.tree_iter(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), 0)


def _rng(values: Mapping[str, Any] | None) -> RNGState | None:
    return None if values is None else RNGState(**values)
