"""What may differ between the models of a batch that one trainer trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainers.config.errors import ConfigurationError, ValidationError, problem
from trainers.settings import GenericTrainerConfig


@dataclass(frozen=True, kw_only=True)
class PerModel:
    """Settings of each model of a `ModelBatch`, in place of the one setting of a `GenericTrainerConfig`.

    Learning rates and the like are the optimizer's: see `OptimizerFactory`.

    Attributes:
        max_grad_norm: Largest norm of each model's gradient; None in the list does not clip that model. Default: that
            of the trainer's config, for all.
        early_stopping_patience: Validations without a new best that stop a model; None in the list never stops that
            model. Default: that of the trainer's config, for all.
        loss_args: Further arguments of the loss, by name: tensors ``[num_models, ...]``.

    Raises:
        ValidationError: Values of the wrong type, or bounds that are not positive; all of them are named.

    Example:
        >>> PerModel(max_grad_norm=[1.0, None]).max_grad_norm
        [1.0, None]
    """

    max_grad_norm: Sequence[float | None] | None = None
    early_stopping_patience: Sequence[int | None] | None = None
    loss_args: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        for name, kinds, expected in (
            ("max_grad_norm", (int, float), "a number > 0, or None"),
            ("early_stopping_patience", (int,), "a whole number > 0, or None"),
        ):
            values = getattr(self, name)
            if values is not None and not isinstance(values, (list, tuple)):
                problems.append(problem(name, values, f"a list with one value per model: {expected}"))
                continue
            for model, value in enumerate(values or ()):
                if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not value > 0):
                    problems.append(problem(f"{name}[{model}]", value, expected))
        for name, tensor in self.loss_args.items():
            if not isinstance(tensor, Tensor) or not tensor.dim():
                problems.append(problem(f"loss_args[{name!r}]", tensor, "a tensor [num_models, ...]"))
        if problems:
            raise ValidationError(problems, "PerModel")

    def check(self, num_models: int) -> None:
        """Refuse settings of another number of models.

        Args:
            num_models: How many there are.

        Raises:
            ConfigurationError: There are values for another number.
        """
        given = {
            "max_grad_norm": self.max_grad_norm,
            "early_stopping_patience": self.early_stopping_patience,
            **{f"loss_args[{name!r}]": values for name, values in self.loss_args.items()},
        }
        for name, values in given.items():
            if values is not None and len(values) != num_models:
                raise ConfigurationError(
                    f"PerModel.{name}: received {len(values)} values; expected {num_models}, one per model"
                )

    def of_models(self, models: Sequence[int]) -> PerModel:
        """Return the settings of some of the models.

        Args:
            models: Their numbers, in the wanted order.

        Example:
            >>> PerModel(max_grad_norm=[1.0, None, 3.0]).of_models([2, 0]).max_grad_norm
            [3.0, 1.0]
        """

        def chosen(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[model] for model in models]

        return PerModel(
            max_grad_norm=chosen(self.max_grad_norm),
            early_stopping_patience=chosen(self.early_stopping_patience),
            loss_args={name: values[torch.tensor(models)] for name, values in self.loss_args.items()},
        )

    def loss_args_on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the arguments of the loss where the models are; those that are there already are not copied.

        Args:
            device: Of the models.

        Example:
            >>> PerModel(loss_args={"weight": torch.ones(2)}).loss_args_on(torch.device("cpu"))
            {'weight': tensor([1., 1.])}
        """
        return {name: values.to(device) for name, values in self.loss_args.items()}

    def clip_norm(self, num_models: int, config: GenericTrainerConfig) -> float | Tensor | None:
        """Return what `ModelBatch.make_train_step` is to clip by.

        Args:
            num_models: Of the batch.
            config: Of the trainer.

        Returns:
            One norm for all, ``[num_models]`` norms, or None if no model is clipped.

        Raises:
            ConfigurationError: There are values for another number of models.
        """
        norms = self.max_grad_norm
        if norms is None:
            return config.max_grad_norm
        self.check(num_models)
        if all(norm is None for norm in norms):
            return None
        # In double precision: models in it are clipped by exactly the given number.
        return torch.tensor([float("inf") if norm is None else norm for norm in norms], dtype=torch.float64)

    def patiences(self, num_models: int, config: GenericTrainerConfig) -> list[int | None]:
        """Return the patience of every model.

        Args:
            num_models: Of the batch.
            config: Of the trainer.

        Raises:
            ConfigurationError: There are values for another number of models.
        """
        if self.early_stopping_patience is None:
            return [config.early_stopping_patience] * num_models
        self.check(num_models)
        return list(self.early_stopping_patience)
