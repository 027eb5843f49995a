"""Optimizer and learning rate schedules of a batch of experiments, from the experiments' configurations.

Experiments of one batch name the same optimizer and the same schedule; every number may be each one's own. What a
configuration says is either used or refused: a setting that the named class does not have is an error.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import lr_scheduler

from mb_torch import InvalidInput, ModelBatch, OptimizerFactory
from trainers.config.errors import ConfigurationError, ValidationError, problem
from trainers.config.schema import ExperimentConfig, OptimizerConfig, SchedulerConfig

_LOGGER = logging.getLogger(__name__)

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}
_OPTIMIZER_FIELDS = {"lr": "learning_rate", **{name: name for name in ("weight_decay", "betas", "eps", "amsgrad")}}

# Schedules that are functions of the optimizer step, with the fields of `SchedulerConfig` that they use.
_FORMULAS = {
    "constant": {"warmup_steps", "min_lr"},
    "linear": {"warmup_steps", "min_lr", "max_steps"},
    "cosine": {"warmup_steps", "min_lr", "max_steps"},
    "step": {"warmup_steps", "min_lr", "gamma", "step_size"},
    "multistep": {"warmup_steps", "min_lr", "gamma", "milestones"},
    "exponential": {"warmup_steps", "min_lr", "gamma"},
}


class _TorchSchedule(NamedTuple):
    """A class of torch.

    Attributes:
        scheduler_cls: The class.
        interval: When it is stepped.
        fields: Its arguments that fields of the configuration stand for, as dotted keys.
    """

    scheduler_cls: type
    interval: str
    fields: dict[str, str]


_TORCH_SCHEDULES = {
    "reduce_on_plateau": _TorchSchedule(
        lr_scheduler.ReduceLROnPlateau, "epoch", {"factor": "scheduler.gamma", "min_lr": "scheduler.min_lr"}
    ),
    "cyclic": _TorchSchedule(lr_scheduler.CyclicLR, "step", {"max_lr": "optimizer.learning_rate"}),
    "one_cycle": _TorchSchedule(
        lr_scheduler.OneCycleLR,
        "step",
        {
            "max_lr": "optimizer.learning_rate",
            "total_steps": "scheduler.max_steps",
            "epochs": "scheduler.max_steps",
            "steps_per_epoch": "scheduler.max_steps",
        },
    ),
    "cosine_annealing_warm_restarts": _TorchSchedule(
        lr_scheduler.CosineAnnealingWarmRestarts, "step", {"eta_min": "scheduler.min_lr"}
    ),
}


def make_optimizer(batch: ModelBatch, configs: Sequence[ExperimentConfig]) -> torch.optim.Optimizer:
    """Make the optimizer of a batch of experiments, with one parameter group for each.

    ``optimizer.weight_decay``, ``betas``, ``eps`` and ``amsgrad`` are passed on where the named class has them, also
    where torch's own default is another one; ``custom_params`` are its further options (momentum, nesterov, ...).

    Args:
        batch: The models.
        configs: One per model.

    Returns:
        What ``OptimizerFactory.create_optimizer`` returns.

    Raises:
        ConfigurationError: The name is unknown or differs between the experiments; the class lacks or refuses a
            setting, named with the experiment.
        InvalidInput: Another number of configurations than models.

    Example:
        >>> from trainers.config.schema import DataConfig, ModelConfig, TrainingConfig
        >>> def experiment(name, rate):
        ...     sections = ModelConfig("mlp"), TrainingConfig(), DataConfig("digits")
        ...     return ExperimentConfig(name, *sections, OptimizerConfig("AdamW", lr=rate))
        >>> batch = ModelBatch([nn.Linear(4, 2) for _ in range(2)])
        >>> optimizer = make_optimizer(batch, [experiment("first", 0.1), experiment("second", 0.2)])
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.1, 0.01), (0.2, 0.01)]
    """
    name = _common_name("optimizer.name", {config.experiment_name: config.optimizer.name.lower() for config in configs})
    optimizer_cls = optimizer_class(name)
    options = [_optimizer_options(name, config) for config in configs]
    return OptimizerFactory(optimizer_cls).create_optimizer(batch, options)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of torch that a configuration names.

    Args:
        name: ``optimizer.name``, in any case.

    Raises:
        ConfigurationError: The name is unknown.

    Example:
        >>> optimizer_class("AdamW").__name__
        'AdamW'
    """
    if name.lower() not in _OPTIMIZERS:
        raise ConfigurationError(problem("optimizer.name", name, f"one of {', '.join(_OPTIMIZERS)}"))
    return _OPTIMIZERS[name.lower()]


def make_schedulers(
    optimizer: torch.optim.Optimizer, configs: Sequence[ExperimentConfig], steps_per_epoch: int
) -> tuple[Any, str]:
    """Make the learning rate schedules of a batch of experiments.

    ``constant``, ``linear``, ``cosine``, ``step``, ``multistep`` and ``exponential`` are one scheduler for all. The
    rate of optimizer step t (from 0) is ``(t + 1) / (warmup_steps + 1)`` of the learning rate during the first
    ``warmup_steps`` steps. Then ``linear`` and ``cosine`` fall to ``min_lr``, which they reach at step ``max_steps``;
    without it at ``training.max_steps``, else after ``training.epochs``. ``step``, ``multistep`` and ``exponential``
    multiply by ``gamma`` at the end of every ``step_size``-th epoch, of the epochs in ``milestones``, of every epoch,
    counted from the beginning. No rate is below ``min_lr``, unless the learning rate itself is.

    ``reduce_on_plateau``, ``cyclic``, ``one_cycle`` and ``cosine_annealing_warm_restarts`` are torch's own classes, one
    scheduler per model, without warm-up. ``custom_params`` are their options. The learning rate is the top of the
    cycles of ``cyclic`` and ``one_cycle``; ``gamma`` is the factor of ``reduce_on_plateau``.

    A warm-up that is longer than a tenth of the run is logged as a warning.

    Args:
        optimizer: From `make_optimizer`, not stepped yet. Load a checkpoint afterwards, into both.
        configs: One per model.
        steps_per_epoch: Optimizer steps, see `optimizer_steps`.

    Returns:
        A scheduler, a list with one per model, or None without a schedule; and ``"step"`` or ``"epoch"``, when it is to
        be stepped (``scheduler_interval`` of the trainer).

    Raises:
        ConfigurationError: The name is unknown or differs between the experiments; the schedule lacks a setting, or
            does not use or refuses one, named with the experiment.

    Example:
        >>> from trainers.config.schema import DataConfig, ModelConfig, TrainingConfig
        >>> sections = ModelConfig("mlp"), TrainingConfig(max_steps=4), DataConfig("digits"), OptimizerConfig(lr=1.0)
        >>> config = ExperimentConfig("first", *sections, SchedulerConfig("linear", warmup_steps=1, min_lr=0.1))
        >>> optimizer = make_optimizer(ModelBatch([nn.Linear(4, 2)]), [config])
        >>> scheduler, interval = make_schedulers(optimizer, [config], steps_per_epoch=10)
        >>> rates = scheduler.get_last_lr()
        >>> for _ in range(4):
        ...     optimizer.step()
        ...     scheduler.step()
        ...     rates += scheduler.get_last_lr()
        >>> [round(rate, 4) for rate in rates], interval
        ([0.5, 1.0, 0.7, 0.4, 0.1], 'step')
    """
    if type(steps_per_epoch) is not int or steps_per_epoch < 1:
        raise ConfigurationError(f"steps_per_epoch: received {steps_per_epoch!r}; expected a whole number >= 1")
    if len(configs) != len(optimizer.param_groups):
        raise ConfigurationError(
            f"make_schedulers: received {len(configs)} configurations; expected {len(optimizer.param_groups)}, one per "
            "parameter group"
        )
    name = _common_name("scheduler.name", {config.experiment_name: _scheduler_name(config) for config in configs})
    if name is None:
        return None, "epoch"
    if name in _FORMULAS:
        factors = [_factor(name, config, steps_per_epoch) for config in configs]
        _warn_of_long_warmup(configs, steps_per_epoch)
        return lr_scheduler.LambdaLR(optimizer, factors), "step"
    if name in _TORCH_SCHEDULES:
        chosen = _TORCH_SCHEDULES[name]
        options = [_torch_options(name, config, steps_per_epoch) for config in configs]
        try:
            factory = OptimizerFactory(type(optimizer))
            return factory.create_lr_scheduler(optimizer, chosen.scheduler_cls, options), chosen.interval
        except InvalidInput as error:
            raise ConfigurationError(f"scheduler {name}, models in the order of the configurations: {error}") from error
    raise ConfigurationError(problem("scheduler.name", name, f"one of {', '.join([*_FORMULAS, *_TORCH_SCHEDULES])}"))


def scheduler_interval(config: ExperimentConfig) -> str:
    """Return when the schedule of an experiment is stepped, for ``GenericTrainerConfig.scheduler_interval``.

    Args:
        config: Of the experiment.

    Returns:
        ``"step"`` or ``"epoch"``.

    Example:
        >>> from trainers.config.schema import DataConfig, ModelConfig, TrainingConfig
        >>> sections = ModelConfig("mlp"), TrainingConfig(), DataConfig("digits"), OptimizerConfig()
        >>> scheduler_interval(ExperimentConfig("first", *sections, SchedulerConfig("cosine")))
        'step'
    """
    chosen = _TORCH_SCHEDULES.get(_scheduler_name(config) or "")
    if chosen is not None:
        return chosen.interval
    return "epoch" if config.scheduler is None else "step"


def optimizer_steps(batches: int, gradient_accumulation_steps: int) -> int:
    """Return how many optimizer steps the trainer makes of a number of batches, with one for an incomplete rest.

    Args:
        batches: Of an epoch.
        gradient_accumulation_steps: Batches a step.

    Example:
        >>> optimizer_steps(10, 4)
        3
    """
    return math.ceil(batches / gradient_accumulation_steps)


def _common_name(key: str, names: dict[str, Any]) -> Any:
    """The name that all experiments have."""
    by_name: dict[Any, list[str]] = {}
    for experiment, name in names.items():
        by_name.setdefault(name, []).append(experiment)
    if len(by_name) != 1:
        received = ", ".join(f"{name} in {', '.join(experiments)}" for name, experiments in by_name.items()) or "none"
        raise ConfigurationError(f"{key}: received {received}; expected one name for all experiments of a batch")
    return next(iter(by_name))


def _optimizer_options(name: str, config: ExperimentConfig) -> dict[str, Any]:
    """The keyword arguments of the optimizer."""
    section = config.optimizer
    accepted = _arguments(_OPTIMIZERS[name], ("params",))
    fields = {option: getattr(section, entry) for option, entry in _OPTIMIZER_FIELDS.items()}
    fields["betas"] = tuple(section.betas)
    problems = [
        problem(f"optimizer.{entry}", getattr(section, entry), f"the default, because {name} has no such option")
        for option, entry in _OPTIMIZER_FIELDS.items()
        if option not in accepted and getattr(section, entry) != getattr(OptimizerConfig(), entry)
    ]
    stand_for = {option: f"optimizer.{entry}" for option, entry in _OPTIMIZER_FIELDS.items()}
    problems += _custom_problems("optimizer", name, section.custom_params, stand_for, accepted)
    options = {option: value for option, value in fields.items() if option in accepted} | section.custom_params
    if not problems:
        try:
            _OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], **options)
        except Exception as error:  # classes refuse their options with several types of error
            problems.append(problem("optimizer", options, f"what {name} takes. It says: {error}"))
    _raise_if(problems, config)
    return options


def _scheduler_name(config: ExperimentConfig) -> str | None:
    return None if config.scheduler is None else config.scheduler.name.lower().replace("-", "_")


def _factor(name: str, config: ExperimentConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by, as a function of the optimizer step."""
    section, rate = config.scheduler, config.optimizer.learning_rate
    assert section is not None
    assert rate is not None
    _raise_if([*_formula_problems(name, section), *_unused(name, section, _FORMULAS[name])], config)
    # A learning rate that is not above min_lr has no bound; annealing leaves it where it is.
    is_bounded = rate > section.min_lr
    target = section.min_lr / rate if is_bounded else 1.0
    floor = target if is_bounded else 0.0
    warmup, end = section.warmup_steps, _length(config, steps_per_epoch)
    gamma, step_size, milestones = section.gamma, section.step_size, section.milestones

    def annealed(step: int) -> float:
        if step < warmup:
            return 1.0
        progress = min(1.0, (step - warmup) / (end - warmup)) if end > warmup else 1.0
        left = 1.0 - progress if name == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
        return target + (1.0 - target) * left

    def decayed(step: int) -> float:
        epoch = step // steps_per_epoch
        if name == "step":
            return gamma ** (epoch // step_size)
        return gamma ** (epoch if name == "exponential" else sum(epoch >= milestone for milestone in milestones))

    after = {"constant": lambda step: 1.0, "linear": annealed, "cosine": annealed}.get(name, decayed)

    # LambdaLR leaves plain functions out of its state, which so holds nothing but where the run is.
    def factor(step: int) -> float:
        return max(floor, min(1.0, (step + 1) / (warmup + 1)) * after(step))

    return factor


def _formula_problems(name: str, section: SchedulerConfig) -> Iterator[str]:
    """What the formulas cannot be evaluated with, whether or not the configuration has been validated."""
    if section.custom_params:
        yield problem("scheduler.custom_params", section.custom_params, f"none, because {name} uses none")
    if "gamma" in _FORMULAS[name] and not section.gamma > 0:
        yield problem("scheduler.gamma", section.gamma, "more than 0")
    if name == "step" and not section.step_size > 0:
        yield problem("scheduler.step_size", section.step_size, "more than 0")
    if name == "multistep" and not section.milestones:
        yield problem("scheduler.milestones", section.milestones, "at least one epoch")


def _torch_options(name: str, config: ExperimentConfig, steps_per_epoch: int) -> dict[str, Any]:
    """The keyword arguments of one of torch's own schedulers."""
    section, (scheduler_cls, _, fields) = config.scheduler, _TORCH_SCHEDULES[name]
    assert section is not None
    accepted = _arguments(scheduler_cls, ("optimizer", "last_epoch"))
    length = _length(config, steps_per_epoch)
    own: dict[str, dict[str, Any]] = {
        "reduce_on_plateau": {"factor": section.gamma, "min_lr": section.min_lr, "mode": _mode(config)},
        "cyclic": {"max_lr": config.optimizer.learning_rate},
        "one_cycle": {"max_lr": config.optimizer.learning_rate, "total_steps": length},
        "cosine_annealing_warm_restarts": {"eta_min": section.min_lr},
    }
    custom = section.custom_params
    problems = [*_custom_problems("scheduler", name, custom, fields, accepted)]
    used = {key.partition(".")[2] for key in fields.values()}
    problems += _unused(name, section, used)
    problems += [
        f"scheduler.custom_params.{option}: received nothing; {name} needs it"
        for option, has_default in accepted.items()
        if not has_default and option not in {*own[name], *custom}
    ]
    run = _run_length(config, steps_per_epoch)
    if name == "one_cycle" and length < run:
        problems.append(problem("scheduler.max_steps", length, f"at least {run}, the steps of the run: a cycle is one"))
    _raise_if(problems, config)
    return own[name] | custom


def _mode(config: ExperimentConfig) -> str:
    """Whether less or more is better of the metric that the trainer shows a plateau scheduler."""
    return config.training.early_stopping_mode if config.checkpoint.monitor is None else config.checkpoint.mode


def _length(config: ExperimentConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a schedule."""
    training, section = config.training, config.scheduler
    assert section is not None
    return section.max_steps or training.max_steps or training.epochs * steps_per_epoch


def _run_length(config: ExperimentConfig, steps_per_epoch: int) -> int:
    """Optimizer steps after which the run ends."""
    steps = config.training.epochs * steps_per_epoch
    return steps if config.training.max_steps is None else min(steps, config.training.max_steps)


def _warn_of_long_warmup(configs: Sequence[ExperimentConfig], steps_per_epoch: int) -> None:
    """Say it once for all: a configuration alone does not tell how many steps an epoch has."""
    texts = []
    for config in configs:
        warmup, steps = config.scheduler.warmup_steps if config.scheduler else 0, _run_length(config, steps_per_epoch)
        if warmup > steps / 10:
            expected = f"at most a tenth of the {steps} steps of the run, usually"
            texts.append(f"{config.experiment_name}: {problem('scheduler.warmup_steps', warmup, expected)}")
    if texts:
        others = "" if len(texts) == 1 else f" (and {len(texts) - 1} more of these experiments)"
        _LOGGER.warning("%s%s", texts[0], others)


def _arguments(called: type, first: Sequence[str]) -> dict[str, bool]:
    """The options of a class, with whether they have a default."""
    parameters = inspect.signature(called).parameters
    return {
        name: parameter.default is not parameter.empty for name, parameter in parameters.items() if name not in first
    }


def _unused(name: str, section: SchedulerConfig, used: set[str]) -> Iterator[str]:
    """Problems with fields that are set and that a schedule does not use."""
    for entry in ("warmup_steps", "max_steps", "min_lr", "gamma", "step_size", "milestones"):
        value = getattr(section, entry)
        # Without warm-up is what a schedule that has none does.
        is_none = value == getattr(SchedulerConfig(), entry) or (entry == "warmup_steps" and value == 0)
        if entry not in used and not is_none:
            yield problem(f"scheduler.{entry}", value, f"the default, because {name} does not use it")


def _custom_problems(
    section: str, name: str, custom: dict[str, Any], fields: dict[str, str], accepted: dict[str, bool]
) -> Iterator[str]:
    """Problems with the keys of ``custom_params``."""
    for key, value in custom.items():
        if key in fields and key in accepted:
            yield problem(f"{section}.custom_params.{key}", value, f"it as {fields[key]}, which stands for it")
        elif key not in accepted:
            free = ", ".join(option for option in accepted if option not in fields)
            yield problem(f"{section}.custom_params.{key}", value, f"options of {name}: {free}")


def _raise_if(problems: list[str], config: ExperimentConfig) -> None:
    if problems:
        raise ValidationError(problems, f"experiment {config.experiment_name!r}")
