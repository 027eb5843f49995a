"""Experiments that a function builds: ``build(config)`` returns the model, the loss and the data of one experiment."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainers.config.errors import ConfigurationError
from trainers.config.schema import ExperimentConfig
from trainers.reproducibility import seed_everything
from trainers.searches.nested import importing_build
from trainers.states import capture_rng_state, restore_rng_state

Build = Callable[[ExperimentConfig], "Built"]


@dataclass(frozen=True)
class Built:
    """What an experiment trains.

    Experiments whose models, losses and data are alike are trained as one batch, so ``seed`` is for initial weights
    and for the model's own noise only; the order of the data has a seed of its own, ``data.custom_params.order_seed``.

    Attributes:
        model: An untrained module.
        loss_fn: ``loss_fn(outputs, targets, **loss_args)``, a tensor of one element.
        train: Training batches ``(inputs, targets)``: a ``DataLoader``, a list, or an iterable that can be iterated
            again.
        val: Validation batches likewise; None for no validation.
        loss_args: Numbers (or tensors) for the loss, which may differ between the experiments of a batch. Default:
            what the configuration has below ``custom_params.loss_args``.
        metrics: What validation reports besides the loss, by name: ``metric(outputs, targets)``, a number or a
            tensor of one element.

    Example:
        >>> from torch.nn import functional as F
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
        >>> Built(nn.Linear(4, 3), F.cross_entropy, batches).val is None
        True
    """

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    train: Any
    val: Any = None
    loss_args: Mapping[str, Any] | None = None
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)


def load_build(path: str) -> Build:
    """Import a function that builds experiments.

    Args:
        path: ``"module:function"``.

    Returns:
        The function.

    Raises:
        ConfigurationError: It has another form, or cannot be imported; says why.

    Example:
        >>> load_build("trainers.built:Built") is Built
        True
    """
    module, _, name = path.partition(":")
    try:
        with importing_build(path):
            build: Build = getattr(importlib.import_module(module), name)
    except ConfigurationError:
        raise  # says already what to do
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise ConfigurationError(
            f"build: received {path!r}, which cannot be imported: {type(error).__name__}: {error}; expected "
            "'module:function', importable from the project's folder"
        ) from error
    return build


def model_seed(config: ExperimentConfig) -> int:
    """Return the seed of an experiment's weights and noise.

    Args:
        config: Of the experiment.

    Returns:
        ``config.seed``; without one, a number that follows from the name, so that a run that is started again has the
        same.

    Example:
        >>> from trainers.config.schema import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
        >>> sections = ModelConfig("mlp"), TrainingConfig(), DataConfig("digits"), OptimizerConfig()
        >>> model_seed(ExperimentConfig("first", *sections, seed=3))
        3
    """
    if config.seed is not None:
        return config.seed
    return int.from_bytes(hashlib.sha256(config.experiment_name.encode()).digest()[:4], "big")


def build_experiment(build: Build, config: ExperimentConfig) -> Built:
    """Build one experiment, with its own seed; the global generators are put back afterwards.

    Args:
        build: The function.
        config: Of the experiment.

    Returns:
        What it trains, with ``loss_args`` as tensors.

    Raises:
        ConfigurationError: The function returns something else.
    """
    generators = capture_rng_state()
    seed_everything(model_seed(config))
    try:
        built = build(config)
    finally:
        restore_rng_state(generators)
    if not isinstance(built, Built) or not isinstance(built.model, nn.Module) or not callable(built.loss_fn):
        raise ConfigurationError(
            f"build of {config.experiment_name}: received {_described(built)}; expected a trainers.built.Built with a "
            "module and a loss function"
        )
    given = built.loss_args if built.loss_args is not None else config.custom_params.get("loss_args", {})
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"loss_args of {config.experiment_name}: received a {type(given).__name__}; expected a dict of numbers"
        )
    arguments = {name: _tensor(config.experiment_name, name, value) for name, value in given.items()}
    return Built(built.model, built.loss_fn, built.train, built.val, arguments, built.metrics)


def _tensor(experiment: str, name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, int, float)):
        return torch.tensor(float(value))
    raise ConfigurationError(f"loss_args[{name!r}] of {experiment}: received {value!r}; expected a number or a tensor")


def _described(built: Any) -> str:
    if not isinstance(built, Built):
        return f"a {type(built).__name__}"
    return f"a Built with a {type(built.model).__name__} as model and a {type(built.loss_fn).__name__} as loss_fn"
