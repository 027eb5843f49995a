"""`GenericTrainerConfig`: what a trainer is told, as flat fields, as groups, or as a mixture."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import numbers
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from trainers.config.errors import ConfigurationError, ValidationError, problem
from trainers.config.fields import Field, fields_of
from trainers.config.schema import CheckpointConfig, LoggingConfig, PerformanceConfig, PreemptionConfig
from trainers.config.validation import NEVER_HANDLED

if TYPE_CHECKING:
    from trainers.config.schema import ExperimentConfig

_NOT_GIVEN: Any = object()
_Value = TypeVar("_Value")
_ClassT = TypeVar("_ClassT", bound=type)
_GROUPS: dict[str, type] = {
    "checkpoint": CheckpointConfig,
    "preemption": PreemptionConfig,
    "performance": PerformanceConfig,
    "logging": LoggingConfig,
}
_WORDS = {bool: "True or False", str: "a string"}
_LEGAL: dict[str, tuple[str | None, ...]] = {
    "mode": ("min", "max"),
    "early_stopping_mode": ("min", "max"),
    "scheduler_interval": ("epoch", "step"),
    "mixed_precision": (None, "16-mixed", "bf16-mixed"),
    "on_nan_loss": ("stop", "skip", "freeze"),
}


class _InGroup(Generic[_Value]):
    """A flat field that lives in a group, so that both always read equal.

    Args:
        group: Name of the group.
        name: The field there.
        factor: Flat value = group's value times this.
    """

    def __init__(self, group: str, name: str, factor: int | None = None) -> None:
        self.group = group
        self.name = name
        self.factor = factor

    def __set_name__(self, owner: type, name: str) -> None:
        self.flat_name = name

    @overload
    def __get__(self, instance: None, owner: type) -> _Value: ...

    @overload
    def __get__(self, instance: object, owner: type) -> _Value: ...

    def __get__(self, instance: object | None, owner: type) -> _Value:
        if instance is None:
            # What the dataclass takes for the default of the constructor's argument.
            return _NOT_GIVEN
        value = getattr(getattr(instance, self.group), self.name)
        return value if self.factor is None or value is None else value * self.factor

    def __set__(self, instance: object, value: _Value) -> None:
        if value is _NOT_GIVEN:
            return
        entry = fields_of(_GROUPS[self.group])[self.name]
        if entry.item is str and not entry.is_list and _is_number(value):
            # The group would take it for a text, as in a file.
            return _refuse(instance, problem(self.flat_name, value, _expected(entry)))
        if self.factor is not None and value is not None and not _is_number(value):
            return _refuse(instance, problem(self.flat_name, value, "a number, more than 0"))
        stored: Any = value if self.factor is None or value is None else value / self.factor  # type: ignore[operator]
        group = getattr(instance, self.group)
        if not instance.__dict__.get("_complete"):
            given = getattr(group, self.name)
            if given not in (getattr(type(group)(), self.name), stored):
                shown = given if self.factor is None else given * self.factor
                raise ConfigurationError(
                    f"{self.flat_name}: received {value!r}, but {self.group}.{self.name} says {shown!r}; "
                    "expected one of them"
                )
            # The group may be the caller's own object.
            group = copy.copy(group)
            setattr(instance, self.group, group)
            explicit = instance.__dict__.setdefault("_explicit", set())
            explicit.add((self.group, self.name))
        setattr(group, self.name, stored)


def _suggests_fields(configuration_class: _ClassT) -> _ClassT:
    """Decorate a dataclass: a keyword that is no field is refused as such an attribute is, with the one meant."""
    changed: Any = configuration_class
    generated = changed.__init__

    @functools.wraps(generated)
    def constructor(self: Any, *arguments: Any, **keywords: Any) -> None:
        known = {entry.name for entry in fields(self)}
        for name in keywords:
            if name not in known:
                raise TypeError(_no_field(self, name))
        generated(self, *arguments, **keywords)

    changed.__init__ = constructor
    return configuration_class


@_suggests_fields
@dataclass(kw_only=True)
class GenericTrainerConfig:
    """How a `GenericTrainer` trains, saves, resumes and logs.

    Most fields are those of a group under a flat name. Give either, or both where they agree; they read equal.

    Attributes:
        checkpoint: Group: where, when and what to save.
        preemption: Group: signals, requeueing and resuming.
        performance: Group: accumulation, precision and compilation.
        logging: Group: where metrics are written.
        max_epochs: Epochs of the whole run.
        max_steps: Optimizer steps of the whole run; None for no bound.
        experiment_name: Folder of the checkpoints below ``checkpoint_dir``; None for ``checkpoint_dir`` itself.
        validate_every_n_epochs: Validation after epochs n, 2n, ... (counted from 1).
        early_stopping_patience: Stop after so many validations in a row without a new best; None never does. In a
            `ModelBatch` each model is frozen on its own, and the run stops when none is left.
        early_stopping_metric: Key of the epoch's logs.
        early_stopping_mode: ``"min"`` or ``"max"``.
        scheduler_interval: ``"epoch"`` or ``"step"``.
        on_nan_loss: What a loss that is NaN or infinite does: ``"stop"`` raises a TrainerError; ``"skip"`` leaves the
            batch out, and the model with its buffers as it was, for a copy of the buffers before every batch (single
            models); ``"freeze"`` freezes the model from then on (models of a `ModelBatch`).
        seed: Of Python's, NumPy's and torch's generators when a run begins; None leaves them as they are.
        deterministic: Whether only algorithms that give the same result every time are used; torch warns of
            operations that have none.
        benchmark: Whether cuDNN looks for the fastest algorithms.
        save_in_background: Whether training goes on while a copy of the state is written: faster where files are slow,
            for one more copy of models and optimizer state in memory. The last save of a run is waited for.
        checkpoint_dir: Flat name of ``checkpoint.checkpoint_dir``.
        save_every_n_epochs: Of the same name in ``checkpoint``.
        save_every_n_steps: Of the same name in ``checkpoint``.
        save_every_n_minutes: Of the same name in ``checkpoint``.
        save_top_k: Of the same name in ``checkpoint``.
        monitor: Of the same name in ``checkpoint``.
        mode: Of the same name in ``checkpoint``.
        filename: Of the same name in ``checkpoint``.
        save_rng_state: ``checkpoint.save_rng``.
        preemption_timeout: ``preemption.timeout_minutes``, in seconds.
        signals: Of the same name in ``preemption``.
        requeue_signals: Of the same name in ``preemption``.
        requeue_job: Of the same name in ``preemption``.
        max_preemptions: Of the same name in ``preemption``.
        auto_resume: Of the same name in ``preemption``.
        gradient_accumulation_steps: Of the same name in ``performance``. Default: 1.
        max_grad_norm: ``performance.clip_grad_norm``; None does not clip. Default: 1.
        mixed_precision: Of the same name in ``performance``.
        compile_model: Of the same name in ``performance``.
        log_every_n_steps: Of the same name in ``logging``.
        log_loss_every_n_steps: Another spelling of ``log_every_n_steps``.

    Raises:
        ConfigurationError: A field and its group contradict each other.
        ValidationError: Values of another type or out of range, all of them named; it is also a ``ValueError``.
        TypeError: A keyword is no field.
        AttributeError: Later something is set that is no field.

    Example:
        >>> GenericTrainerConfig(save_top_k=2).checkpoint.save_top_k
        2
        >>> GenericTrainerConfig(checkpoint=CheckpointConfig(save_top_k=3)).save_top_k
        3
    """

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    max_epochs: int = 100
    max_steps: int | None = None
    experiment_name: str | None = None
    validate_every_n_epochs: int = 1
    early_stopping_patience: int | None = None
    early_stopping_metric: str = "val_loss"
    early_stopping_mode: str = "min"
    scheduler_interval: str = "epoch"
    on_nan_loss: str = "stop"
    seed: int | None = None
    deterministic: bool = False
    benchmark: bool = False
    save_in_background: bool = False

    checkpoint_dir: _InGroup[str] = _InGroup("checkpoint", "checkpoint_dir")
    save_every_n_epochs: _InGroup[int | None] = _InGroup("checkpoint", "save_every_n_epochs")
    save_every_n_steps: _InGroup[int | None] = _InGroup("checkpoint", "save_every_n_steps")
    save_every_n_minutes: _InGroup[float | None] = _InGroup("checkpoint", "save_every_n_minutes")
    save_top_k: _InGroup[int] = _InGroup("checkpoint", "save_top_k")
    monitor: _InGroup[str | None] = _InGroup("checkpoint", "monitor")
    mode: _InGroup[str] = _InGroup("checkpoint", "mode")
    filename: _InGroup[str] = _InGroup("checkpoint", "filename")
    save_rng_state: _InGroup[bool] = _InGroup("checkpoint", "save_rng")
    preemption_timeout: _InGroup[float] = _InGroup("preemption", "timeout_minutes", factor=60)
    signals: _InGroup[list[Any]] = _InGroup("preemption", "signals")
    requeue_signals: _InGroup[list[Any]] = _InGroup("preemption", "requeue_signals")
    requeue_job: _InGroup[bool] = _InGroup("preemption", "requeue_job")
    max_preemptions: _InGroup[int] = _InGroup("preemption", "max_preemptions")
    auto_resume: _InGroup[bool] = _InGroup("preemption", "auto_resume")
    gradient_accumulation_steps: _InGroup[int] = _InGroup("performance", "gradient_accumulation_steps")
    max_grad_norm: _InGroup[float | None] = _InGroup("performance", "clip_grad_norm")
    mixed_precision: _InGroup[str | None] = _InGroup("performance", "mixed_precision")
    compile_model: _InGroup[bool] = _InGroup("performance", "compile_model")
    log_every_n_steps: _InGroup[int] = _InGroup("logging", "log_every_n_steps")
    log_loss_every_n_steps: _InGroup[int] = _InGroup("logging", "log_every_n_steps")

    def __post_init__(self) -> None:
        explicit = self.__dict__.pop("_explicit", set())
        refused = self.__dict__.pop("_refused", [])
        # What is set here later must not reach the caller's sections, which may be those of an experiment.
        for group in _GROUPS:
            setattr(self, group, copy.deepcopy(getattr(self, group)))
        if self.performance.gradient_accumulation_steps is None:
            self.performance.gradient_accumulation_steps = 1
        if self.performance.clip_grad_norm is None and ("performance", "clip_grad_norm") not in explicit:
            self.performance.clip_grad_norm = 1.0
        # Those that are none are among the problems.
        with contextlib.suppress(ValidationError):
            handled, requeued = self.signal_numbers(), self.requeue_numbers()
            self.preemption.signals = [number.name for number in handled]
            if ("preemption", "requeue_signals") not in explicit and ("preemption", "signals") in explicit:
                # The default names signals that the caller may have left out.
                requeued = [number for number in requeued if number in handled]
            self.preemption.requeue_signals = [number.name for number in requeued]
        self._complete = True
        _raise_any([*refused, *self._problems()])

    def __setattr__(self, name: str, value: Any) -> None:
        known = {entry.name for entry in fields(self)}
        # A subclass may have class attributes of its own.
        if name not in known and not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(_no_field(self, name))
        if name in _GROUPS and not isinstance(value, _GROUPS[name]):
            _refuse(self, problem(name, value, f"a {_GROUPS[name].__name__}"))
            # So that the rest can be looked through as well.
            value = _GROUPS[name]()
        super().__setattr__(name, value)

    def check(self) -> None:
        """Refuse wrong types and ranges; `GenericTrainer` does so again, because fields may have been set since.

        Raises:
            ValidationError: All that is wrong, by name.
        """
        _raise_any(self._problems())

    @classmethod
    def from_experiment_config(cls, config: ExperimentConfig) -> GenericTrainerConfig:
        """Take from an experiment's configuration what concerns the trainer.

        Args:
            config: Of the experiment; not changed.

        Returns:
            The trainer's configuration.

        Example:
            >>> from trainers.config.schema import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig
            >>> from trainers.config.schema import TrainingConfig
            >>> sections = ModelConfig("mlp"), TrainingConfig(epochs=3), DataConfig("digits"), OptimizerConfig()
            >>> GenericTrainerConfig.from_experiment_config(ExperimentConfig("first", *sections)).max_epochs
            3
        """
        training = config.training
        return cls(
            checkpoint=config.checkpoint,
            preemption=config.preemption,
            performance=config.performance,
            logging=config.logging,
            max_epochs=training.epochs,
            max_steps=training.max_steps,
            experiment_name=config.experiment_name,
            validate_every_n_epochs=training.validation_every_n_epochs,
            early_stopping_patience=training.early_stopping_patience,
            early_stopping_metric=training.early_stopping_metric,
            early_stopping_mode=training.early_stopping_mode,
            seed=config.seed,
            deterministic=config.deterministic,
            benchmark=config.benchmark,
            # Said expressly: None switches clipping off, where in the group it means "not given".
            max_grad_norm=config.performance.clip_grad_norm,
        )

    @property
    def saves_unasked(self) -> bool:
        """Whether a run saves by itself: at its end or now and then."""
        checkpoint = self.checkpoint
        intervals = (checkpoint.save_every_n_epochs, checkpoint.save_every_n_steps, checkpoint.save_every_n_minutes)
        return checkpoint.save_last or any(interval is not None for interval in intervals)

    def signal_numbers(self) -> list[signal.Signals]:
        """Return the signals that make the trainer save and stop."""
        return _as_signals("signals", self.preemption.signals)

    def requeue_numbers(self) -> list[signal.Signals]:
        """Return those of the signals after which Slurm is asked to start the job again."""
        return _as_signals("requeue_signals", self.preemption.requeue_signals)

    def to_dict(self) -> dict[str, Any]:
        """Return the groups and the fields that belong to none, as plain dicts.

        Example:
            >>> GenericTrainerConfig(max_epochs=3).to_dict()["max_epochs"]
            3
        """
        flat = {entry.name for entry in fields(self) if isinstance(vars(type(self)).get(entry.name), _InGroup)}
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in flat}
        for group in _GROUPS:
            values[group] = asdict(values[group])
        return values

    def _problems(self) -> list[str]:
        problems = []
        counts = (
            "max_epochs max_steps validate_every_n_epochs early_stopping_patience save_every_n_epochs "
            "save_every_n_steps gradient_accumulation_steps log_every_n_steps"
        )
        needed = {"max_epochs", "validate_every_n_epochs", "gradient_accumulation_steps", "log_every_n_steps"}
        for name in counts.split():
            value = getattr(self, name)
            if (value is not None or name in needed) and not (_is_whole(value) and value > 0):
                problems.append(problem(name, value, "a whole number, more than 0"))
        for name in ("save_every_n_minutes", "max_grad_norm", "preemption_timeout"):
            value = getattr(self, name)
            if (value is not None or name == "preemption_timeout") and not (_is_number(value) and value > 0):
                problems.append(problem(name, value, "a number, more than 0"))
        seconds = self.checkpoint.timeout_seconds
        if not (_is_number(seconds) and seconds > 0):
            problems.append(problem("checkpoint.timeout_seconds", seconds, "a number, more than 0"))
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**32):
            problems.append(problem("seed", self.seed, "a whole number from 0 to 2^32 - 1, or None"))
        if not (_is_whole(self.max_preemptions) and self.max_preemptions >= 0):
            problems.append(problem("max_preemptions", self.max_preemptions, "a whole number, 0 or more"))
        if not (_is_whole(self.save_top_k) and (self.save_top_k >= 1 or self.save_top_k == -1)):
            problems.append(problem("save_top_k", self.save_top_k, "a whole number, 1 or more, or -1 to keep all"))
        for name, legal in _LEGAL.items():
            if getattr(self, name) not in legal:
                problems.append(problem(name, getattr(self, name), " or ".join(map(repr, legal))))
        problems += self._wrong_types()
        try:
            handled = self.signal_numbers()
            strangers = [number.name for number in self.requeue_numbers() if number not in handled]
        except ValidationError as error:
            return problems + error.problems
        if strangers:
            problems.append(problem("requeue_signals", strangers, f"some of signals = {self.signals}"))
        return problems

    def _wrong_types(self) -> Iterator[str]:
        """What is wrong with switches and texts; a name here is the flat one where there is one."""
        flat = {
            (entry.group, entry.name): name
            for name, entry in vars(GenericTrainerConfig).items()
            if isinstance(entry, _InGroup)
        }
        own = [("", self, GenericTrainerConfig)]
        for group, holder, kind in [*own, *((name, getattr(self, name), kind) for name, kind in _GROUPS.items())]:
            for entry in fields_of(kind).values():
                name = flat.get((group, entry.name), f"{group}.{entry.name}" if group else entry.name)
                value = getattr(holder, entry.name)
                if entry.item not in _WORDS or entry.is_list or name in _LEGAL:
                    continue
                if not isinstance(value, entry.item) and not (value is None and entry.is_optional):
                    yield problem(name, value, _expected(entry))


def _expected(entry: Field) -> str:
    return _WORDS[entry.item] + (" or None" if entry.is_optional else "")


def _no_field(config: Any, name: str) -> str:
    close = difflib.get_close_matches(name, [entry.name for entry in fields(config)], n=1, cutoff=0.5)
    return f"{type(config).__name__} has no field {name!r}." + (f" Did you mean {close[0]!r}?" if close else "")


def _refuse(config: Any, text: str) -> None:
    """At once; while the configuration is made, with all else that is wrong."""
    if config.__dict__.get("_complete"):
        _raise_any([text])
    config.__dict__.setdefault("_refused", []).append(text)


def _raise_any(problems: list[str]) -> None:
    if problems:
        raise ValidationError(problems, "GenericTrainerConfig")


def _as_signals(name: str, values: Any) -> list[signal.Signals]:
    """One signal or several, as names, numbers or members of ``signal.Signals``."""
    found = []
    for value in values if isinstance(values, (list, tuple)) else [values]:
        try:
            found.append(signal.Signals[value] if isinstance(value, str) else signal.Signals(value))
            if found[-1].name in NEVER_HANDLED:
                raise ValueError(f"no process can handle {found[-1].name}")
        except (KeyError, ValueError) as error:
            raise ValidationError(
                problem(name, value, "a signal that a process can handle here, such as 'SIGUSR1'"),
                "GenericTrainerConfig",
            ) from error
    return found


def _is_whole(value: Any) -> bool:
    # NumPy's integers are such numbers as well.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
