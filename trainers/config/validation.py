"""Rules about values: what makes a configuration invalid, and what is only unusual."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainers.config.errors import problem
from trainers.config.inherited import INHERITED
from trainers.config.schema import ExperimentConfig, SchedulerConfig, SLURMConfig

_LONGEST_NAME = 200
_LARGEST_SEED = 2**32 - 1
_LARGE_BATCH = 10_000

_POSITIVE = """
    model.hidden_size model.num_layers model.num_heads model.num_classes
    training.epochs training.max_steps training.batch_size training.learning_rate training.gradient_accumulation_steps
    training.max_grad_norm training.early_stopping_patience training.validation_every_n_epochs
    data.batch_size optimizer.learning_rate optimizer.eps scheduler.max_steps
    slurm.nodes slurm.ntasks_per_node slurm.cpus_per_task logging.log_every_n_steps
    checkpoint.save_every_n_epochs checkpoint.save_every_n_steps checkpoint.save_every_n_minutes
    checkpoint.timeout_seconds preemption.timeout_minutes
    performance.gradient_accumulation_steps performance.clip_grad_norm performance.prefetch_factor
""".split()
_NOT_NEGATIVE = """
    optimizer.weight_decay scheduler.warmup_steps scheduler.min_lr data.num_workers performance.num_workers
    preemption.grace_period_seconds preemption.max_preemptions
""".split()

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_MEMORY = re.compile(r"[0-9]+[KMGT]?B?", re.IGNORECASE)
_TIME = re.compile(r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_RESOURCE = re.compile(r"[A-Za-z].*")

_OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "adagrad", "adadelta", "adamax")
_SCHEDULERS = (
    *("step", "multistep", "exponential", "cosine", "reduce_on_plateau"),
    *("cyclic", "one_cycle", "cosine_annealing_warm_restarts"),
)
_PRECISIONS = ("16-mixed", "bf16-mixed")
# Signals that no process can handle.
NEVER_HANDLED = ("SIGKILL", "SIGSTOP")


class Findings(NamedTuple):
    """What is wrong with a configuration, and what is only unusual.

    Attributes:
        problems: One text a problem, each beginning with the dotted key.
        warnings: Likewise for what is accepted.
    """

    problems: list[str]
    warnings: list[str]


def check_values(config: ExperimentConfig) -> Findings:
    """Return what is wrong and what is unusual about the values of a configuration.

    Args:
        config: Its fields have the types of the schema.

    Returns:
        Everything found.

    Example:
        >>> from trainers.config.schema import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
        >>> config = ExperimentConfig("run", ModelConfig("mlp", dropout=2), TrainingConfig(), DataConfig("digits"),
        ...                           OptimizerConfig())
        >>> check_values(config).problems
        ['model.dropout: received 2; expected 0 to 1']
    """
    return Findings([*_problems(config)], [*_warnings(config)])


def experiment_name_problem(name: str, key: str = "experiment_name") -> str | None:
    """Return what is wrong with the name of an experiment: it names a directory, a git ref and a job as well.

    Args:
        name: The name.
        key: What the text begins with.

    Returns:
        A text, or None for a legal name.

    Example:
        >>> experiment_name_problem("lr=0.1") is None
        True
        >>> experiment_name_problem("../run")
        "experiment_name: received '../run'; expected 1 to 200 letters, digits and ..."
    """
    is_legal = _NAME.fullmatch(name) and ".." not in name and not name.endswith((".", ".lock"))
    if is_legal and len(name) <= _LONGEST_NAME:
        return None
    expected = (
        f"1 to {_LONGEST_NAME} letters, digits and . _ = + -, a letter or digit first, no '..', "
        "no '.' or '.lock' at the end"
    )
    return problem(key, name, expected)


def _value(config: ExperimentConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    value = getattr(config, section)
    return value if value is None or not name else getattr(value, name)


def _own_value(config: ExperimentConfig, key: str) -> Any:
    """The value of a field; None if it is that of its source, where it is reported already."""
    value = _value(config, key)
    return None if key in INHERITED and value == _value(config, INHERITED[key]) else value


def _problems(config: ExperimentConfig) -> Iterator[str]:
    name_problem = experiment_name_problem(config.experiment_name)
    if name_problem:
        yield name_problem
    for key in ("model.name", "data.dataset_name"):
        if not _value(config, key).strip():
            yield problem(key, _value(config, key), "a name")
    for key in _POSITIVE:
        value = _own_value(config, key)
        if value is not None and not value > 0:
            yield problem(key, value, "more than 0")
    for key in _NOT_NEGATIVE:
        value = _own_value(config, key)
        if value is not None and not value >= 0:
            yield problem(key, value, "0 or more")
    yield from _other_ranges(config)
    if config.scheduler is not None:
        yield from _scheduler_problems(config.scheduler)
    if config.slurm is not None:
        yield from _slurm_problems(config.slurm)
    yield from _signal_problems(config)


def _other_ranges(config: ExperimentConfig) -> Iterator[str]:
    if config.seed is not None and not 0 <= config.seed <= _LARGEST_SEED:
        yield problem("seed", config.seed, f"0 to {_LARGEST_SEED}")
    if not 0 <= config.model.dropout <= 1:
        yield problem("model.dropout", config.model.dropout, "0 to 1")
    for key in ("training.early_stopping_mode", "checkpoint.mode"):
        if _value(config, key) not in ("min", "max"):
            yield problem(key, _value(config, key), "min or max")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield problem("optimizer.betas", betas, "two numbers, each 0 or more and less than 1")
    if config.checkpoint.save_top_k < 1 and config.checkpoint.save_top_k != -1:
        yield problem("checkpoint.save_top_k", config.checkpoint.save_top_k, "1 or more, or -1 to keep all")
    if config.performance.mixed_precision not in (None, *_PRECISIONS):
        expected = f"{' or '.join(_PRECISIONS)}, or null for full precision"
        yield problem("performance.mixed_precision", config.performance.mixed_precision, expected)
    if config.logging.log_level.upper() not in logging.getLevelNamesMapping():
        yield problem("logging.log_level", config.logging.log_level, "DEBUG, INFO, WARNING, ERROR or CRITICAL")


def _scheduler_problems(scheduler: SchedulerConfig) -> Iterator[str]:
    name = scheduler.name.lower()
    if name == "step":
        if scheduler.step_size <= 0:
            yield problem("scheduler.step_size", scheduler.step_size, "more than 0")
        if not 0 < scheduler.gamma <= 1:
            yield problem("scheduler.gamma", scheduler.gamma, "more than 0 and at most 1")
    milestones = scheduler.milestones
    if name == "multistep" and (not milestones or milestones != sorted(set(milestones))):
        yield problem("scheduler.milestones", milestones, "at least one number, all different and ascending")
    if scheduler.max_steps is not None and scheduler.warmup_steps >= scheduler.max_steps:
        expected = f"less than scheduler.max_steps = {scheduler.max_steps}"
        yield problem("scheduler.warmup_steps", scheduler.warmup_steps, expected)


def _slurm_problems(slurm: SLURMConfig) -> Iterator[str]:
    for name, value in vars(slurm).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and _CONTROL.search(text):
                yield problem(f"slurm.{name}", text, "one line without control characters")
    for argument in slurm.additional_args:
        if not argument.startswith("-"):
            yield problem("slurm.additional_args", argument, "options that begin with -")
    for name in ("mem", "mem_per_cpu"):
        memory = getattr(slurm, name)
        if memory is not None and not _MEMORY.fullmatch(memory):
            expected = "a whole number with K, M, G or T, such as 32G"
            yield problem(f"slurm.{name}", memory, expected, "sbatch takes no fractions: write 1536M for 1.5G.")
    if slurm.time_limit is not None and not _TIME.fullmatch(slurm.time_limit):
        forms = "M, M:S, H:M:S, D-H, D-H:M or D-H:M:S"
        yield problem("slurm.time_limit", slurm.time_limit, f"minutes, hours and days in one of the forms {forms}")
    if slurm.gres is not None and not _RESOURCE.fullmatch(slurm.gres):
        yield problem(
            "slurm.gres", slurm.gres, "a kind of resource first, such as gpu:2", "Or set slurm.gpus_per_node."
        )


def _signal_problems(config: ExperimentConfig) -> Iterator[str]:
    known = signal.Signals.__members__.keys() - set(NEVER_HANDLED)
    for key in ("preemption.signals", "preemption.requeue_signals"):
        for name in _value(config, key):
            if name not in known:
                yield problem(key, name, "names of signals that a process can handle here, such as SIGUSR1")
    extra = [name for name in config.preemption.requeue_signals or [] if name not in config.preemption.signals]
    if extra:
        yield problem("preemption.requeue_signals", extra, f"some of preemption.signals = {config.preemption.signals}")


def _warnings(config: ExperimentConfig) -> Iterator[str]:
    if config.optimizer.name.lower() not in _OPTIMIZERS:
        yield problem("optimizer.name", config.optimizer.name, f"one of {', '.join(_OPTIMIZERS)}, unless it is yours")
    scheduler = config.scheduler
    if scheduler is not None and scheduler.name.lower() not in _SCHEDULERS:
        yield problem("scheduler.name", scheduler.name, f"one of {', '.join(_SCHEDULERS)}, unless it is yours")
    for key in ("training.learning_rate", "optimizer.learning_rate"):
        rate = _own_value(config, key)
        if rate is not None and rate > 1:
            yield problem(key, rate, "at most 1, usually")
    batch, accumulated = config.data.batch_size or 0, config.performance.gradient_accumulation_steps or 0
    if batch * accumulated > _LARGE_BATCH:
        factors = f"data.batch_size {batch} x performance.gradient_accumulation_steps {accumulated}"
        yield problem("data.batch_size", batch * accumulated, f"at most {_LARGE_BATCH}, usually, for {factors}")
    steps = config.training.max_steps if scheduler is None else scheduler.max_steps or config.training.max_steps
    if scheduler is not None and steps is not None and scheduler.warmup_steps > steps / 10:
        yield problem("scheduler.warmup_steps", scheduler.warmup_steps, f"at most a tenth of {steps} steps, usually")
    patience, interval = config.training.early_stopping_patience, config.training.validation_every_n_epochs
    if patience is not None and patience < interval:
        expected = f"at least training.validation_every_n_epochs = {interval}, usually"
        yield problem("training.early_stopping_patience", patience, expected)
    if config.slurm is not None and (config.slurm.time_limit or "").isdecimal():
        yield problem("slurm.time_limit", config.slurm.time_limit, "H:M:S, usually", "A bare number counts minutes.")
