"""Optimizers and schedulers with one parameter group per model, and the configurations for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from mb_torch.configs import check_configs
from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.schedule import create_lr_scheduler

if TYPE_CHECKING:
    from mb_torch.core import ModelBatch

_UNSUPPORTED = {
    torch.optim.LBFGS: "its line search evaluates each model on its own",
    torch.optim.SparseAdam: "stacked gradients are dense",
}


class OptimizerFactory:
    """Build optimizers and schedulers with per-model parameter groups.

    Args:
        optimizer_cls: A class like ``torch.optim.SGD``. SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax,
            NAdam and RAdam update whole stacks at once; any other optimizer that handles each parameter group
            by itself works too, as slowly as one optimizer per model.
        base_config: Options shared by all models; a model's own configuration overrides them. Default: none.

    Raises:
        InvalidInput: Not an optimizer class, or the options are no dict.
        Unsupported: LBFGS or SparseAdam.

    Example:
        >>> from mb_torch import ModelBatch
        >>> mb = ModelBatch([torch.nn.Linear(4, 2) for _ in range(3)])
        >>> factory = OptimizerFactory(torch.optim.SGD, {"momentum": 0.9})
        >>> optimizer = factory.create_optimizer(mb, create_lr_sweep_configs(0.01, 1.0, 3))
        >>> [round(group["lr"], 4) for group in optimizer.param_groups]
        [0.01, 0.1, 1.0]
    """

    def __init__(self, optimizer_cls: type[Optimizer], base_config: Mapping[str, Any] | None = None) -> None:
        if not isinstance(optimizer_cls, type) or not issubclass(optimizer_cls, Optimizer):
            raise InvalidInput(
                "OptimizerFactory", received=repr(optimizer_cls), expected="a class like torch.optim.SGD"
            )
        for unsupported, reason in _UNSUPPORTED.items():
            if issubclass(optimizer_cls, unsupported):
                raise Unsupported(
                    f"{optimizer_cls.__name__} with per-model groups: {reason}",
                    fix="Train these models one by one, or choose another optimizer.",
                )
        (self.base_config,) = check_configs([{} if base_config is None else base_config], 1, "base_config")
        self.optimizer_cls = optimizer_cls

    def create_optimizer(self, model_batch: ModelBatch, configs: Sequence[Mapping[str, Any]]) -> Optimizer:
        """Return an optimizer with one parameter group per model.

        The groups are live: ``optimizer.param_groups[i]["lr"] = 0.1`` acts on model i's next step. Frozen
        parameters are left out.

        Args:
            model_batch: The models.
            configs: One dict of options per model.

        Returns:
            A ``torch.optim.Optimizer``. Beside the usual methods it has ``update(grads, active)`` for
            gradients that are not in ``.grad`` and for freezing models, ``model_state_dict(i)``, which a
            plain optimizer over model i's parameters loads, and ``load_model_state_dict(i, state)``.

        Raises:
            InvalidInput: Wrong number of configurations, an option that `optimizer_cls` does not have or
                refuses (the error names model and option), or no parameter requires a gradient.

        Example:
            >>> from mb_torch import ModelBatch
            >>> mb = ModelBatch([torch.nn.Linear(4, 2) for _ in range(2)])
            >>> configs = create_adam_configs([1e-3, 1e-2])
            >>> len(OptimizerFactory(torch.optim.Adam).create_optimizer(mb, configs).param_groups)
            2
        """
        own = check_configs(configs, model_batch.num_models)
        return model_batch.backend.make_optimizer(
            self.optimizer_cls, [{**self.base_config, **config} for config in own]
        )

    def create_lr_scheduler(
        self, optimizer: Optimizer, scheduler_cls: type, configs: Sequence[Mapping[str, Any]]
    ) -> list[Any]:
        """Return a list of schedulers, one per parameter group; see `mb_torch.schedule.create_lr_scheduler`.

        Example:
            >>> from mb_torch import ModelBatch
            >>> mb = ModelBatch([torch.nn.Linear(4, 2) for _ in range(2)])
            >>> factory = OptimizerFactory(torch.optim.SGD)
            >>> optimizer = factory.create_optimizer(mb, [{"lr": 0.1}, {"lr": 0.2}])
            >>> configs = [{"step_size": 10}, {"step_size": 20}]
            >>> len(factory.create_lr_scheduler(optimizer, torch.optim.lr_scheduler.StepLR, configs))
            2
        """
        return create_lr_scheduler(optimizer, scheduler_cls, configs)


def create_sgd_configs(
    learning_rates: Sequence[float], momentum: float = 0.9, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """Return one ``torch.optim.SGD`` configuration per learning rate.

    Args:
        learning_rates: One per model.
        momentum: Of all models. Default: 0.9.
        weight_decay: Of all models. Default: 1e-4.

    Example:
        >>> create_sgd_configs([0.1])
        [{'lr': 0.1, 'momentum': 0.9, 'weight_decay': 0.0001}]
    """
    return [{"lr": lr, "momentum": momentum, "weight_decay": weight_decay} for lr in learning_rates]


def create_adam_configs(
    learning_rates: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return one ``torch.optim.Adam`` configuration per learning rate.

    Args:
        learning_rates: One per model.
        betas: Of all models. Default: (0.9, 0.999).
        eps: Of all models. Default: 1e-8.
        weight_decay: Of all models. Default: 0.

    Example:
        >>> create_adam_configs([0.1])
        [{'lr': 0.1, 'betas': (0.9, 0.999), 'eps': 1e-08, 'weight_decay': 0.0}]
    """
    return [{"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay} for lr in learning_rates]


def create_lr_sweep_configs(
    min_lr: float, max_lr: float, num_models: int, scale: str = "log"
) -> list[dict[str, float]]:
    """Return configurations whose learning rates go from `min_lr` to `max_lr`, both included.

    Args:
        min_lr: Learning rate of the first model, and of the only one if there is one.
        max_lr: Learning rate of the last model.
        num_models: How many models there are.
        scale: ``"log"`` for equal ratios, ``"linear"`` for equal differences. Default: ``"log"``.

    Raises:
        InvalidInput: An argument is out of range.

    Example:
        >>> [round(config["lr"], 3) for config in create_lr_sweep_configs(0.001, 0.1, 3)]
        [0.001, 0.01, 0.1]
    """
    if scale not in ("log", "linear"):
        raise InvalidInput("create_lr_sweep_configs: scale", received=repr(scale), expected="'log' or 'linear'")
    if isinstance(num_models, bool) or not isinstance(num_models, int) or num_models < 1:
        raise InvalidInput("create_lr_sweep_configs: num_models", received=num_models, expected="at least 1")
    smallest = 0.0 if scale == "linear" else math.ulp(0.0)
    if not smallest <= min_lr <= max_lr < math.inf:
        bounds = "0 <= min_lr <= max_lr" if scale == "linear" else "0 < min_lr <= max_lr"
        raise InvalidInput(
            f"create_lr_sweep_configs with scale={scale!r}",
            received=f"min_lr={min_lr}, max_lr={max_lr}",
            expected=f"{bounds}, finite",
        )
    shares = [model / (num_models - 1) for model in range(num_models - 1)] if num_models > 1 else []
    if scale == "log":
        rates = [min_lr * (max_lr / min_lr) ** share for share in shares]
    else:
        rates = [min_lr + (max_lr - min_lr) * share for share in shares]
    return [{"lr": rate} for rate in (*rates, max_lr if num_models > 1 else min_lr)]
