"""`GenericTrainer`: trains a module or a batch of models, survives being stopped anywhere, and goes on exactly."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mb_torch import ModelBatch
from trainers.checkpoints.files import checkpoint_timeout, preemption_timeout, read_checkpoint
from trainers.checkpoints.objects import apply_objects, kept_on_failure
from trainers.checkpoints.saving import Saves
from trainers.checkpoints.snapshot import (
    apply_run,
    check_same_place,
    collect,
    is_finished,
    own_rank,
    warn_of_other_settings,
)
from trainers.checkpoints.store import DEFAULT_FILENAME, LATEST, CheckpointStore
from trainers.config.errors import ConfigurationError
from trainers.errors import MissingCheckpointError, TrainerError
from trainers.fit_arguments import check_fit_arguments, check_ranks
from trainers.hooks import TrainerHooks
from trainers.loaders.processes import can_fork
from trainers.loaders.resumable import make_resumable
from trainers.loop import TrainingLoop
from trainers.per_model import PerModel
from trainers.preemption.boundaries import Preempted
from trainers.preemption.signals import SignalFlags
from trainers.ranks import (
    failing_together,
    is_first_rank,
    of_first_rank,
    on_first_rank,
    tell_failure,
    warn_of_unconnected_tasks,
)
from trainers.reporting.loggers import absolute_places, at_places, make_loggers, messages_as_configured
from trainers.reporting.metrics import MetricFunction
from trainers.reproducibility import algorithms, seed_everything
from trainers.schedules import as_list
from trainers.searches.executors import INTERRUPTED_EXIT_CODE
from trainers.settings import GenericTrainerConfig
from trainers.states import ResumeState, TrainerPhase, restore_rng_state
from trainers.training import AutogradTraining, FusedTraining, Training, as_pair, device_of, train_mode_if_evaluating

_LOGGER = logging.getLogger(__name__)


class GenericTrainer(TrainerHooks):
    """Trains one module, or a `ModelBatch`, with exact resume, checkpoints, signals, callbacks and loggers.

    Override `training_step` (and `validation_step`), or give ``loss_fn``. A `ModelBatch` with ``loss_fn`` trains
    through its fused step, every model as if alone: clipping, early stopping and ``on_nan_loss="freeze"`` act on each
    model. With step functions of your own, clipping and early stopping do so as well; for the latter the metric is a
    tensor ``[num_models]``, and the optimizer made by `OptimizerFactory`.

    The logs of a `ModelBatch` have the mean over the models under the plain key, which ``monitor`` and a scheduler of
    all models go by, and each model's own value as ``<key>_model_<i>``. Models that stopped early count on in that
    mean, as they are; those that diverged do not.

    An epoch's logs are unweighted means over its batches: a smaller last batch counts as much as any other. A metric
    of the validation without ``val_`` is there under both names.

    A run that is stopped anywhere and started again ends bit-identical, on a CPU, to one that was never stopped.

    Under ``torch.distributed`` rank 0 writes, and the logs of an epoch are those of rank 0 on all ranks: schedules and
    early stopping go by them. Where a save fails on one rank, or one asks to stop, all do.

    Args:
        config: Of the trainer. Default: all defaults.
        loss_fn: ``loss_fn(outputs, targets)`` of one model; batches are then ``(inputs, targets)``. Default: the step
            functions are overridden.
        metrics: With ``loss_fn``, what validation reports besides the loss: ``metric(outputs, targets)`` of one model,
            a number or a tensor of one element, by name.
        per_model: With ``loss_fn``, what differs between the models of a `ModelBatch`.

    Attributes:
        config: As given.
        model: That is trained; set by `fit`.
        optimizer: Set by `fit`.
        scheduler: Set by `fit`.
        callbacks: In the order added.
        current_phase: What is going on.
        current_epoch: From 0.
        global_step: Optimizer steps done.
        stop_training: Set it to end the run at the next step boundary.
        preempted: Whether the last `fit` was left because of a signal.
        requeued: Whether Slurm was asked to start the job again, and accepted.
        late_signals: Signals that came when the last `fit` could be left no more. It came to its end (unless
            ``preempted``), and the program is to end too: numbers, 0 for `request_preemption`.
        preemption_count: How often the run was requeued.
        logs: Of the last finished epoch.
        model_metrics: Of the last finished epoch, one value per model of a `ModelBatch`.
        stopped_models: Models that were stopped before the end, with the reason; a single module is model 0.
        diverged_models: Those of them whose loss was not finite.

    Raises:
        ConfigurationError: The config is no `GenericTrainerConfig`; ``metrics`` or ``per_model`` without ``loss_fn``.
        TrainerError: The pattern of the names of its checkpoints can name no file.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> batches = [(torch.ones(4, 2), torch.zeros(4, 1))] * 3
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = GenericTrainerConfig(checkpoint_dir=folder, max_epochs=2)
        ...     trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
        ...     trainer.fit(model, torch.optim.SGD(model.parameters(), lr=0.1), batches)
        >>> trainer.global_step, trainer.current_phase.name
        (6, 'TRAINING_COMPLETE')
    """

    def __init__(
        self,
        config: GenericTrainerConfig | None = None,
        *,
        loss_fn: Callable[..., Any] | None = None,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        per_model: PerModel | None = None,
    ) -> None:
        if config is not None and not isinstance(config, GenericTrainerConfig):
            raise ConfigurationError(
                f"GenericTrainer: received a {type(config).__name__}; expected a GenericTrainerConfig. "
                "GenericTrainerConfig.from_experiment_config makes one from an ExperimentConfig."
            )
        if loss_fn is None and (metrics or per_model is not None):
            raise ConfigurationError(
                "GenericTrainer: received metrics or per_model without loss_fn, which would have no effect; expected "
                "loss_fn, or step functions that see to them"
            )
        reported = [name.removeprefix("val_") for name in ("loss", *(metrics or {}))]
        if len(set(reported)) < len(reported) or not all(map(callable, (metrics or {}).values())):
            raise ConfigurationError(
                f"metrics: received {metrics!r}; expected functions by name, all names different, with and without "
                "'val_', from each other and from 'loss', under which the loss itself is reported"
            )
        super().__init__()
        self.config = GenericTrainerConfig() if config is None else config
        self.config.check()
        self.model: Any = None
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.current_phase = TrainerPhase.INIT
        self.current_epoch = 0
        self.global_step = 0
        self.stop_training = False
        self.preempted = False
        self.requeued = False
        self.late_signals: list[int] = []
        self.preemption_count = 0
        self.logs: dict[str, Any] = {}
        self.model_metrics: dict[str, Any] = {}
        self.stopped_models: dict[int, str] = {}
        self.diverged_models: set[int] = set()
        self.signal_flags = SignalFlags(self.config.signal_numbers())
        self.store = self._make_store()
        # Beside the checkpoints, wherever the program is when it calls fit.
        self._log_places = absolute_places(self.config.logging)
        self._saves = Saves(self.store)
        self._loss_fn = loss_fn
        self._metrics = {name: MetricFunction(name, metric) for name, metric in (metrics or {}).items()}
        self._per_model = per_model
        self._loop: TrainingLoop | None = None
        self._to_load: dict[str, Any] | None = None
        self._source: Path | None = None
        self._saved_at: tuple[Any, ...] | None = None
        self._compiled: Any = None
        self._step_at_start = 0

    def fit(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_loader: Any,
        val_loader: Any = None,
        scheduler: Any = None,
    ) -> None:
        """Train to the end, or go on from the newest checkpoint of this run to the end.

        Returns also when a signal asked for it; the run was saved then, and ``preempted`` is true. A signal that comes
        after the last validation batch no longer stops the run: it is in ``late_signals``.

        Args:
            model: A module or a `ModelBatch`, on its device.
            optimizer: Of its parameters.
            train_loader: A ``DataLoader``, a list of batches, or an iterable that can be iterated again.
            val_loader: Likewise; None for no validation.
            scheduler: One, or a list with one per parameter group.

        Raises:
            NotImplementedError: Neither a step function nor ``loss_fn``.
            TrainerError: Model, optimizer and scheduler do not belong together; training cannot go on, or cannot be
                resumed; another process trains in the folder.
            ConfigurationError: Settings do not fit the model or the scheduler, or were changed to what is refused.
            KeyboardInterrupt: After Ctrl-C, once the run is saved.
        """
        self.config.check()
        check_fit_arguments(model, optimizer, scheduler, clips=self.config.max_grad_norm is not None)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self._check_steps(val_loader is not None)
        self.stop_training = self.preempted = self.requeued = False
        self.late_signals = []
        self.signal_flags.clear()
        chosen = algorithms(deterministic=self.config.deterministic, benchmark=self.config.benchmark)
        try:
            # From now on: what is to be resumed may take long to load.
            self.signal_flags.install()
            with messages_as_configured(at_places(self.config.logging, self._log_places)), chosen:
                with failing_together():
                    loop = self._make_loop(train_loader, val_loader)
                check_ranks(loop.batches_per_epoch(), validates=val_loader is not None)
                with self._held_folder():
                    goes_back = self._to_load is not None or not self.config.auto_resume
                    with failing_together():
                        content = self._content_to_resume()
                    check_same_place(content)
                    if content is not None:
                        warn_of_other_settings(self, loop.schedulers, content)
                    if content is not None and is_finished(content, self.config, loop.early_stopping):
                        self._load_complete(loop, content)
                    else:
                        with on_first_rank() as is_first:
                            if is_first and self.config.saves_unasked:
                                self.store.check_writable()
                        self._run(loop, content, goes_back=goes_back)
        finally:
            self.signal_flags.restore()
        self._tell_late_signals()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return the loss of one batch, and whatever else is to be logged. Override it, or give ``loss_fn``.

        Args:
            batch: From the loader.
            batch_idx: From 0 in every epoch.

        Returns:
            A dict with the key ``"loss"``: a tensor to differentiate.
        """
        outputs, targets = self._run_model(batch)
        return {"loss": self._loss(outputs, targets)}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return the metrics of one validation batch. Override it, or give ``loss_fn``.

        Args:
            batch: From the loader.
            batch_idx: From 0 in every validation.

        Returns:
            Metrics by name.
        """
        outputs, targets = self._run_model(batch)
        metrics = {name: self._for_each_model(outputs, targets, metric) for name, metric in self._metrics.items()}
        return {"loss": self._loss(outputs, targets), **metrics}

    def save_checkpoint(self, emergency: bool = False) -> Path:
        """Write a checkpoint of the run as it is; at the end of a batch, of an epoch or of the run.

        Args:
            emergency: Whether the time limit for preemptions holds instead of that for ordinary saves.

        Returns:
            Its path; with ``save_in_background`` the file is complete when `fit` returns, if not earlier.

        Raises:
            TrainerError: There is no run, or something is half done.
            CheckpointTimeoutError: It took longer than ``checkpoint.timeout_seconds``, or the one before did in the
                background.
            PreemptionTimeoutError: With ``emergency``, it took longer than ``preemption.timeout_minutes``.
        """
        loop = self._loop
        if loop is None:
            raise TrainerError("save_checkpoint", received="no run", fix="Call fit() first.")
        state = loop.resume_state()
        before = self.current_phase
        is_ranked = state.train is None and before in (TrainerPhase.EPOCH_END, TrainerPhase.TRAINING_COMPLETE)
        self._saved_at = None
        self.set_phase(TrainerPhase.CHECKPOINT_SAVE_START)
        try:
            content = collect(self, loop, state)
            has_all_logs = is_ranked and loop.has_all_logs(state.epoch)
            is_last = emergency or before is TrainerPhase.TRAINING_COMPLETE
            # Which names are free is known when what is being written is complete.
            seconds, timeout_error = self._time_for_save(emergency=emergency, is_last=is_last)
            name = self._checkpoint_name(state, has_all_logs=has_all_logs, is_safe=emergency)
            path = self.store.folder / name
            if is_first_rank():
                self._saves.save(
                    name,
                    content,
                    is_ranked=is_ranked,
                    seconds=seconds,
                    timeout_error=timeout_error,
                    in_background=self.config.save_in_background and not is_last,
                )
        except Exception as error:
            tell_failure(error)
            raise
        else:
            # Another rank may not see the files there are.
            path = of_first_rank(path)
            self.set_phase(TrainerPhase.CHECKPOINT_SAVE_END)
        finally:
            self.set_phase(before)
        self._saved_at = self._place(state)
        loop.boundaries.was_saved()
        return path

    def load_checkpoint(self, checkpoint_path: str | Path | None = None) -> ResumeState:
        """Read a checkpoint, also of a run that is going on; the next `fit` goes on from it.

        A model and an optimizer that are set already are loaded at once. Checkpoints in the folder of the run that are
        later than this one are given up by that `fit`: it renames them, with a warning.

        Args:
            checkpoint_path: Of the file. Default: the newest of this run.

        Returns:
            Where the run goes on.

        Raises:
            TrainerError: The file is damaged or of another version; there is none (then it is also a
                ``FileNotFoundError``).
        """
        if checkpoint_path is None:
            self._saves.wait()
            self.store.look()
            content = self.store.newest()
            source = self.store.folder / content.get("file", LATEST)
        else:
            source = Path(checkpoint_path)
            content = read_checkpoint(source)
        state, _ = own_rank(content)
        if self.model is not None and self.optimizer is not None:
            schedulers = as_list(self.scheduler, self.config.scheduler_interval)
            with kept_on_failure(self, schedulers):
                apply_objects(self, schedulers, content, str(source))
        self._to_load, self._source = content, source
        return state

    def request_preemption(self) -> None:
        """Ask the run to save and stop at the next boundary, as a signal does; works in any thread."""
        self.signal_flags.received.append(0)

    def set_phase(self, phase: TrainerPhase) -> None:
        """Note what is going on.

        Args:
            phase: The new phase.
        """
        self.current_phase = phase

    def is_saved_here(self) -> bool:
        """Whether there is a checkpoint of the run as it is now; one that is being written is waited for.

        Raises:
            PreemptionTimeoutError: That takes longer than ``preemption.timeout_minutes``.
        """
        if self._loop is None or self._saved_at != self._place(self._loop.resume_state()):
            return False
        return self._saves.finish_within(self.config.preemption_timeout, preemption_timeout)

    @property
    def exit_code(self) -> int:
        """What a script exits with: 75 if the last `fit` was left before its end, so that it is run again; else 0."""
        return INTERRUPTED_EXIT_CODE if self.preempted else 0

    @property
    def has_advanced(self) -> bool:
        """Whether this call of `fit` has made an optimizer step."""
        return self.global_step > self._step_at_start

    def _run_model(self, batch: Any) -> tuple[Any, Any]:
        """Outputs and targets."""
        if self._loss_fn is None:
            raise NotImplementedError("override training_step and validation_step, or give GenericTrainer loss_fn=")
        inputs, targets = as_pair(batch, device_of(self.model))
        return self.model(inputs), targets

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        assert self._loss_fn is not None
        arguments = None if self._per_model is None else self._per_model.loss_args_on(device_of(self.model))
        return self._for_each_model(outputs, targets, self._loss_fn, arguments)

    def _for_each_model(
        self, outputs: Any, targets: Any, function: Callable[..., Tensor], arguments: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """One value, or one per model of a `ModelBatch`."""
        if isinstance(self.model, ModelBatch):
            return self.model.compute_loss(outputs, targets, function, reduction="none", loss_args=arguments)
        return function(outputs, targets)

    def _check_steps(self, validates: bool) -> None:
        """Refuse, before the first batch, what would fail at the first."""
        if self._loss_fn is not None:
            return
        for name, is_needed in (("training_step", True), ("validation_step", validates)):
            if is_needed and getattr(type(self), name) is getattr(GenericTrainer, name):
                raise NotImplementedError(f"override {name}(batch, batch_idx), or give GenericTrainer loss_fn=")

    def _make_store(self) -> CheckpointStore:
        settings = self.config.checkpoint
        # Absolute: what a program does in a run may change its working directory.
        folder = Path(os.path.abspath(os.path.expanduser(settings.checkpoint_dir)))
        name = self.config.experiment_name
        if name is not None and (name in ("", ".", "..") or Path(name).name != name):
            raise ConfigurationError(f"experiment_name: received {name!r}; expected the name of a folder")
        return CheckpointStore(
            folder if name is None else folder / name,
            filename=settings.filename,
            keep=settings.save_top_k,
            monitor=settings.monitor,
            mode=settings.mode,
        )

    def _make_loop(self, train_loader: Any, val_loader: Any) -> TrainingLoop:
        schedulers = as_list(self.scheduler, self.config.scheduler_interval)
        if self.config.compile_model and self._compiled is not self.model:
            self.model.compile()
            self._compiled = self.model
        training: Training
        may_fork = can_fork(self.model)
        overrides = type(self).training_step is not GenericTrainer.training_step
        if isinstance(self.model, ModelBatch) and self._loss_fn is not None and not overrides:
            training = FusedTraining(
                self.model,
                self.optimizer,
                self.config,
                self._loss_fn,
                self.set_phase,
                self._freeze_models,
                self._per_model or PerModel(),
            )
        elif self._per_model is not None:
            raise ConfigurationError(
                "per_model: received settings of single models; expected them only with a ModelBatch whose "
                "training_step is not overridden"
            )
        else:
            training = AutogradTraining(self.model, self.optimizer, self.config, self.training_step, self.set_phase)
        return TrainingLoop(
            self,
            training,
            make_resumable(train_loader, "train_loader", can_fork=may_fork),
            None if val_loader is None else make_resumable(val_loader, "val_loader", can_fork=may_fork),
            schedulers,
        )

    def _freeze_models(self, losses: dict[int, float]) -> None:
        assert self._loop is not None
        self._loop.results.freeze(losses)

    @contextmanager
    def _held_folder(self) -> Iterator[None]:
        """Hold the checkpoint folder, tidied up and looked through, in the first rank for all."""
        warn_of_unconnected_tasks(self.store.folder)
        with ExitStack() as stack:
            with on_first_rank() as is_first:
                if is_first:
                    stack.enter_context(self.store.held())
            with failing_together():
                if not is_first:
                    self.store.look()
            yield

    def _content_to_resume(self) -> dict[str, Any] | None:
        """What `load_checkpoint` was given, else the newest checkpoint of the run, else None."""
        if self._to_load is not None or not self.config.auto_resume or not (self.store.files or self.store.damaged):
            return self._to_load
        try:
            content = self.store.newest()
        except MissingCheckpointError as error:
            _LOGGER.warning(
                "%s. Training starts from the beginning; a file whose name is taken by a new checkpoint is renamed.",
                error.problem,
            )
            return None
        self._source = self.store.folder / content.get("file", LATEST)
        return content

    def _time_for_save(self, *, emergency: bool, is_last: bool) -> tuple[float, Callable[[float], TrainerError]]:
        """Seconds, once nothing is being written in the background any more; makes the error."""
        if not emergency:
            if is_last:
                self._saves.finish()
            else:
                self._saves.wait()
            return self.config.checkpoint.timeout_seconds, checkpoint_timeout
        allowed, begin = self.config.preemption_timeout, time.monotonic()
        self._saves.finish_within(allowed, preemption_timeout)
        return allowed - (time.monotonic() - begin), lambda _: preemption_timeout(allowed)

    def _checkpoint_name(self, state: ResumeState, *, has_all_logs: bool, is_safe: bool) -> str:
        """The name of a file; with ``is_safe`` there is one whatever the pattern."""
        try:
            return self.store.name_for(state.epoch, state.global_step, self.logs, has_all_logs=has_all_logs)
        except TrainerError as error:
            if not is_safe:
                raise
            _LOGGER.warning("%s. The default name is used.", error)
            return DEFAULT_FILENAME.format(epoch=state.epoch, step=state.global_step)

    def _set_position(self, state: ResumeState) -> None:
        self.current_phase, self.current_epoch, self.global_step = state.phase, state.epoch, state.global_step

    def _load(self, loop: TrainingLoop, content: dict[str, Any]) -> tuple[ResumeState, dict[str, Any]]:
        """Take everything over from a checkpoint, but the random generators; returns this rank's part of it."""
        # Where it fails in one process, all keep what they have.
        with kept_on_failure(self, loop.schedulers), failing_together():
            own = own_rank(content)
            apply_objects(self, loop.schedulers, content, str(self._source))
            apply_run(self, loop, content)
        # Only now: after an error, the next fit() with other objects goes on from the same checkpoint.
        self._to_load = None
        self._set_position(own[0])
        return own

    def _load_complete(self, loop: TrainingLoop, content: dict[str, Any]) -> None:
        state, _ = self._load(loop, content)
        if state.rng is not None:
            # Where the run was killed after its last save, the program goes on as after the run itself.
            restore_rng_state(state.rng)
        _LOGGER.warning(
            "the run in %s is complete: its weights were loaded, and nothing is trained. For a new run give another "
            "experiment_name or checkpoint_dir; for a longer one raise max_epochs or max_steps",
            self.store.folder,
        )

    def _run(self, loop: TrainingLoop, content: dict[str, Any] | None, *, goes_back: bool) -> None:
        state, loader_state = None, None
        if content is not None:
            state, loader_state = self._load(loop, content)
            _LOGGER.info("the run goes on in epoch %d after step %d", state.epoch, state.global_step)
        else:
            self._begin_anew()
        self._loop, self._saved_at = loop, None
        if self.config.monitor is not None and self.store.has_one_name():
            _LOGGER.warning(
                "checkpoint.filename: received %r, one name for all states: while one is the best by monitor=%r it "
                "keeps its file, and others are saved in a second one, with a number in its name; best.ckpt and "
                "latest.ckpt say which is which",
                self.config.filename,
                self.config.monitor,
            )
        self._step_at_start = self.global_step
        train_mode_if_evaluating(self.model)
        with on_first_rank() as is_first:
            if is_first and goes_back:
                self.store.set_aside_later_than(content)
            if is_first:
                loop.loggers = make_loggers(
                    at_places(self.config.logging, self._log_places),
                    self.config.experiment_name,
                    self.config.to_dict(),
                    {} if content is None else content["trackers"],
                    None if state is None else state.global_step,
                )
        try:
            if state is not None:
                self.call_hooks("on_resume_from_checkpoint", state)
            self.call_hooks("on_training_start")
            loop.run(state, loader_state)
            self._saves.wait()
        except Preempted:
            _LOGGER.info("the run was left after step %d and can be resumed", self.global_step)
        except KeyboardInterrupt:
            self.set_phase(TrainerPhase.ERROR_RECOVERABLE)
            raise
        except BaseException:
            self.set_phase(TrainerPhase.ERROR_FATAL)
            raise
        finally:
            self._saves.finish()
            loop.close()

    def _begin_anew(self) -> None:
        """Forget what an earlier run has left; model, optimizer and schedulers stay as they were given."""
        self._set_position(ResumeState(TrainerPhase.INIT, 0, 0))
        self.logs, self.model_metrics, self.preemption_count = {}, {}, 0
        self.stopped_models, self.diverged_models = {}, set()
        self.store.best = None
        if self.config.seed is not None:
            seed_everything(self.config.seed)

    def _tell_late_signals(self) -> None:
        """Pass on what came after the last boundary, which the handlers have kept from the program."""
        if self.signal_flags.interrupted:
            raise KeyboardInterrupt("the run came to its end, or was saved")
        self.late_signals = list(self.signal_flags.received)
        if self.late_signals and not self.preempted:
            _LOGGER.warning("a signal came when the run could be left no more; it is in late_signals")

    def _place(self, state: ResumeState) -> tuple[Any, ...]:
        """What tells two states of a run apart."""
        train, val = state.train, state.val
        batches = (None if train is None else train.batch_idx, None if val is None else val.batch_idx)
        return state.phase, state.epoch, state.global_step, *batches
