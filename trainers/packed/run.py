"""Runs a pack: builds its experiments, trains those that are alike as one batch, and writes what became of each."""

from __future__ import annotations

import copy
import functools
import gc
import json
import logging
import os
import signal
import traceback
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mb_torch import ModelBatch
from trainers.built import Build, Built, build_experiment, load_build, model_seed
from trainers.checkpoints.store import DEFAULT_FILENAME, CheckpointStore, check_filename
from trainers.config.creation import examine
from trainers.config.errors import ConfigurationError, ValidationError, problem
from trainers.config.files import write_atomically, written
from trainers.config.manager import ConfigurationManager
from trainers.config.schema import ExperimentConfig
from trainers.folder_lock import held
from trainers.packed.alike import group_alike
from trainers.packed.experiment_files import ExperimentFiles
from trainers.packed.first_batch import first_batch
from trainers.packed.from_config import (
    make_optimizer,
    make_schedulers,
    optimizer_class,
    optimizer_steps,
    scheduler_interval,
)
from trainers.packed.memory import is_out_of_memory, models_that_fit
from trainers.packed.regroup import starting_points, write_members
from trainers.per_model import PerModel
from trainers.population import Population
from trainers.preemption.requeueing import RequeueDecision
from trainers.preemption.signals import SignalFlags
from trainers.searches.executors import CONFIG_FILE
from trainers.searches.packing import OUTCOME_FILE, PACK_FILE, pack_name
from trainers.settings import GenericTrainerConfig

_LOGGER = logging.getLogger(__name__)

COMPLETED, FAILED, INTERRUPTED = "COMPLETED", "FAILED", "INTERRUPTED"
BACKEND_FILE = "backend.json"
# What experiments may do: one that calls `sys.exit` is not to end the others. Ctrl-C is no fault.
_FAULTS = (Exception, SystemExit)
LOCK_FILE = ".lock"


def run_pack(folder: Path, packs_at_once: int = 1) -> dict[str, dict[str, Any]]:
    """Run the experiments of a pack, or go on where an earlier process was stopped.

    One bad experiment does not stop the others: one that cannot be built, or whose loss is no longer finite, fails
    alone. A signal that comes while nothing trains is heeded before the next experiments begin.

    Args:
        folder: Of the pack, in the folder ``packs`` of the grid search.
        packs_at_once: How many packs share this machine's free memory.

    Returns:
        By experiment: its ``state`` (``"COMPLETED"``, ``"FAILED"`` or ``"INTERRUPTED"``) and the ``error``. The same
        is in ``outcome.json``.

    Raises:
        ConfigurationError: The pack or the function that builds experiments cannot be read, or another process runs
            the pack.
    """
    asked = _read(folder / PACK_FILE)
    refusal = ConfigurationError(f"{folder}: another process runs this pack. Wait for it.")
    with held(folder / LOCK_FILE, lambda: refusal):
        outcomes = _Outcomes(folder / OUTCOME_FILE, asked["experiments"])
        run = _PackRun(folder.parent, asked["build"], asked["backend"], asked["experiments"], outcomes, packs_at_once)
        run.run()
    return outcomes.by_name


class _Outcomes:
    """What became of the experiments, on disk as soon as it is known."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._told: set[tuple[tuple[str, int | None], ...]] = set()
        self.by_name: dict[str, dict[str, Any]] = {name: {"state": INTERRUPTED, "error": None} for name in names}
        self._write()

    def set(self, names: Iterable[str], state: str, error: str | None = None) -> None:
        self.by_name.update({name: {"state": state, "error": error} for name in names})
        self._write()

    def fail(self, names: Collection[str], what: str, error: BaseException) -> None:
        """Note why experiments have failed; of errors that come from one place the log has one traceback."""
        lines = str(error).strip().splitlines() or [""]
        reason = f"{what}: {type(error).__name__}: {lines[0]}"
        place = tuple((frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__))
        _LOGGER.error("%s: %s", ", ".join(names), reason, exc_info=None if place in self._told else error)
        self._told.add(place)
        self.set(names, FAILED, reason)

    @property
    def are_known(self) -> bool:
        """Whether no experiment is left to be run."""
        return all(own["state"] != INTERRUPTED for own in self.by_name.values())

    def _write(self) -> None:
        write_atomically(self._path, written(self.by_name, "json"))


class _PackRun:
    def __init__(
        self,
        packs: Path,
        build: str,
        backend: str | None,
        names: Sequence[str],
        outcomes: _Outcomes,
        packs_at_once: int,
    ) -> None:
        self._packs = packs
        self._build_path = build
        self._backend = backend
        self._outcomes = outcomes
        self._folders = {name: packs.parent / name for name in names}
        self._configs: dict[str, ExperimentConfig] = {}
        self._packs_at_once = packs_at_once
        self._manager = ConfigurationManager(packs.parent, packs)
        # That came while nothing trained: trainers have flags of their own.
        self._signals = SignalFlags(self._signal_numbers())

    def run(self) -> None:
        self._signals.install(and_interrupt=False)
        try:
            try:
                build = load_build(self._build_path)
            except ConfigurationError as error:
                # Of all alike: there is nobody to be told apart from the others.
                self._outcomes.fail(list(self._folders), "it cannot be built", error)
                raise
            self._run_groups(build)
            if self._signals.received and not self._outcomes.are_known:
                self._requeue()
        finally:
            self._signals.restore()

    def _run_groups(self, build: Build) -> None:
        for group in group_alike(self._built(build), self._most):
            for names, content in self._starting_points(list(group)):
                if self._run_part(build, group, names, content):
                    return

    def _run_part(
        self, build: Build, group: Mapping[str, Built], names: list[str], content: dict[str, Any] | None
    ) -> bool:
        """Train experiments, half of them at a time if memory runs out; returns whether a signal asked to leave."""
        if self._signals.received:
            return True
        try:
            return self._train({name: group[name] for name in names}, content)
        except _FAULTS as error:  # whatever it is, other experiments are not to blame
            if len(names) == 1 or not is_out_of_memory(error):
                self._outcomes.fail(names, "training failed", error)
                return False
            half = len(names) // 2
            _LOGGER.warning("memory ran out with %d experiments at once, so half are tried: %s", len(names), str(error))
        # The batch is let go only here, where the error is no more.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        for own in (names[:half], names[half:]):
            again = self._built_again(build, own)
            if not again:
                continue
            for part, start in self._starting_points(list(again)):
                if self._run_part(build, again, part, start):
                    return True
        return False

    def _signal_numbers(self) -> list[signal.Signals]:
        """The signals at which the experiments are left; those of a pack agree in them."""
        for folder in self._folders.values():
            try:
                config = _config_in(folder / CONFIG_FILE, self._manager)
            except Exception:  # its experiment fails when it is built
                continue
            return [signal.Signals[name] for name in config.preemption.signals]
        return []

    def _requeue(self) -> None:
        """Have Slurm start the job again, as a trainer does when it is asked to leave."""
        config = next(iter(self._configs.values()), None)
        if config is not None:
            # Checkpoints count how often a run was requeued; where nothing trains only Slurm does.
            count = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            settings = GenericTrainerConfig.from_experiment_config(config)
            RequeueDecision(settings, self._signals.received, count, has_advanced=False).carry_out()

    def _built(self, build: Build) -> Iterator[tuple[str, Built]]:
        models = weakref.WeakSet[nn.Module]()
        for name, folder in self._folders.items():
            if self._signals.received:
                return
            try:
                config = _config_in(folder / CONFIG_FILE, self._manager)
                built = build_experiment(build, config)
                if built.model in models:
                    raise ConfigurationError(
                        "build: received the model of an earlier experiment again; expected a new one at every call, "
                        "because its weights follow from the seed of its experiment"
                    )
                _check_settings(config, built)
            except _FAULTS as error:  # the user's code may raise anything
                self._outcomes.fail([name], "it cannot be built", error)
            else:
                models.add(built.model)
                self._configs[name] = config
                yield name, built

    def _built_again(self, build: Build, names: Sequence[str]) -> dict[str, Built]:
        """Experiments as before their first batch: what has trained with them has moved on the order of their data."""
        group: dict[str, Built] = {}
        for name in names:
            try:
                built = build_experiment(build, self._configs[name])
            except _FAULTS as error:  # the user's code may raise anything
                self._outcomes.fail([name], "it cannot be built", error)
                continue
            first = next(iter(group.values()), built)
            group[name] = replace(built, train=first.train, val=first.val)
        return group

    def _most(self, name: str, built: Built) -> int:
        """How many such experiments can train at once; 0 if this one cannot train at all."""
        try:
            size = models_that_fit(built, self._packs_at_once)
        except _FAULTS as error:  # the model, the loss and the data are the user's code
            self._outcomes.fail([name], "it cannot be trained", error)
            return 0
        if size < len(self._folders):
            _LOGGER.info("%s: memory is free for %d such experiments at once", name, size)
        return size

    def _starting_points(self, names: list[str]) -> list[tuple[list[str], dict[str, Any] | None]]:
        if not self._configs[names[0]].preemption.auto_resume:
            return [(names, None)]
        return starting_points(self._packs, self._build_path, names, self._part_folder)

    def _part_folder(self, names: Sequence[str]) -> Path:
        return self._packs / pack_name(self._build_path, names)

    def _train(self, group: Mapping[str, Built], content: dict[str, Any] | None) -> bool:
        """Train experiments that are alike; returns whether a signal asked to leave."""
        names, first = list(group), next(iter(group.values()))
        configs = [self._configs[name] for name in names]
        folder = self._part_folder(names)
        write_members(folder, self._build_path, names)
        if content is not None:
            _write_first(folder, content, configs[0])
        population = Population(
            self._batch(folder, group, configs),
            functools.partial(_optimize, configs=configs, train=first.train),
            loss_fn=first.loss_fn,
            names=names,
            config=_trainer_config(configs[0], folder),
            metrics=first.metrics,
            per_model=_per_model(configs, list(group.values())),
            keep_best=configs[0].checkpoint.monitor,
            mode=configs[0].checkpoint.mode,
        )
        files = ExperimentFiles(self._folders, self._configs, population.history, population.best_models)
        population.add_callback(files)
        try:
            population.fit(first.train, first.val)
        finally:
            self._signals.received.extend(population.trainer.signal_flags.received)
        if population.trainer.preempted:
            self._signals.clear()  # heeded, and the job is requeued if it is to be
            return True
        end = population.trainer.store.newest()
        completed = []
        for place, name in enumerate(names):
            try:
                files.export(name, end)
            except Exception as error:  # a full disk, a name that cannot be a file's
                self._outcomes.fail([name], "its checkpoint was not written", error)
            else:
                if place in population.trainer.diverged_models:
                    self._outcomes.set([name], FAILED, f"it was stopped: {population.trainer.stopped_models[place]}")
                else:
                    completed.append(name)
        self._outcomes.set(completed, COMPLETED)
        return False

    def _batch(self, folder: Path, group: Mapping[str, Built], configs: Sequence[ExperimentConfig]) -> ModelBatch:
        def make(**options: Any) -> ModelBatch:
            models = [built.model for built in group.values()]
            return ModelBatch(models, seeds=[model_seed(config) for config in configs], **options)

        if self._backend != "auto":
            return make(backend=self._backend)
        path = folder / BACKEND_FILE
        if not path.is_file():
            # Chosen once: a run that is resumed goes on as it began.
            options = _advised(make(), next(iter(group.values())), configs[0])
            write_atomically(path, written(options, "json"))
        return make(**_read(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} in place of names and values")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}. Start the grid search again.") from error
    return content


def _config_in(path: Path, manager: ConfigurationManager) -> ExperimentConfig:
    # Warnings were logged when the file was written, once for the whole grid.
    examined = examine(manager.load_config(path, validate=False))
    if examined.problems:
        raise ValidationError(examined.problems, str(path))
    return examined.config


def _check_settings(config: ExperimentConfig, built: Built) -> None:
    """Refuse what would stop the other experiments later."""
    seed = _order_seed(config)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ConfigurationError(problem("data.custom_params.order_seed", seed, "a whole number from 0 to 2^32 - 1"))
    check_filename(config.checkpoint.filename)
    _optimize(ModelBatch([nn.Linear(1, 1)], backend="torch"), [0], configs=[config], train=built.train)


def _order_seed(config: ExperimentConfig) -> Any:
    return config.data.custom_params.get("order_seed", 0)


def _advised(batch: ModelBatch, built: Built, config: ExperimentConfig) -> dict[str, Any]:
    inputs, targets = first_batch(built)
    loss_fn: Callable[..., Any] = functools.partial(built.loss_fn, **dict(built.loss_args or {}))
    advice = batch.advise(inputs, targets, loss_fn, optimizer_cls=optimizer_class(config.optimizer.name))
    _LOGGER.info("%s", advice)
    return {name: value for name, value in advice.options.items() if value is not None}


def _optimize(
    batch: ModelBatch, models: Sequence[int], *, configs: Sequence[ExperimentConfig], train: Any
) -> tuple[torch.optim.Optimizer, Any]:
    own = [configs[model] for model in models]
    optimizer = make_optimizer(batch, own)
    if own[0].scheduler is None:
        return optimizer, None
    try:
        batches = len(train)
    except TypeError as error:
        raise ConfigurationError(
            f"scheduler: received {own[0].scheduler.name!r} with a train loader that has no length; expected one that "
            "knows how many batches an epoch has, or no scheduler"
        ) from error
    if not batches:
        return optimizer, None  # the trainer refuses such a loader
    steps = optimizer_steps(batches, own[0].performance.gradient_accumulation_steps or 1)
    return optimizer, make_schedulers(optimizer, own, steps)[0]


def _trainer_config(config: ExperimentConfig, folder: Path) -> GenericTrainerConfig:
    """That of the first experiment, but for what the pack decides or each model has for itself."""
    own = GenericTrainerConfig.from_experiment_config(copy.deepcopy(config))
    own.checkpoint_dir, own.experiment_name = str(folder.parent), folder.name
    own.checkpoint.save_last = True
    own.filename = DEFAULT_FILENAME
    own.max_grad_norm = own.early_stopping_patience = None
    own.on_nan_loss = "freeze"
    own.scheduler_interval = scheduler_interval(config)
    # Of the data; weights and noise of the models have seeds of their own.
    own.seed = _order_seed(config)
    return own


def _per_model(configs: Sequence[ExperimentConfig], built: Sequence[Built]) -> PerModel:
    first = built[0].loss_args or {}
    return PerModel(
        max_grad_norm=[config.performance.clip_grad_norm for config in configs],
        early_stopping_patience=[config.training.early_stopping_patience for config in configs],
        loss_args={name: torch.stack([(one.loss_args or {})[name] for one in built]) for name in first},
    )


def _write_first(folder: Path, content: dict[str, Any], config: ExperimentConfig) -> None:
    """Write the checkpoint from which experiments of other packs go on here."""
    store = CheckpointStore(folder)
    with store.held():
        store.save(
            store.name_for(content["epoch"], content["global_step"], content["metrics"]),
            {**content, "experiment_name": folder.name},
            is_ranked=content["is_ranked"],
            seconds=config.checkpoint.timeout_seconds,
        )
