"""The one table of optimizers: every class and option, with hyper-parameters that differ from model to model.

Below the table is a small problem to train on, in float64: the same models stacked and one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim

NUM_MODELS = 3


@dataclass(frozen=True)
class OptimizerCase:
    """One optimizer class with one configuration per model.

    Attributes:
        name: What tests call it.
        optimizer_cls: The class.
        configs: Keyword arguments, one dict for each of `NUM_MODELS` models.
        stacked: Whether the torch backend updates whole stacks; else it goes through per-model views.
        matrices_only: The class takes two-dimensional parameters only.
    """

    name: str
    optimizer_cls: type[optim.Optimizer]
    configs: tuple[dict[str, Any], ...]
    stacked: bool = True
    matrices_only: bool = False

    def fresh_configs(self) -> list[dict[str, Any]]:
        """Copies of the configurations: an optimizer shares a learning rate given as a tensor."""
        return copy.deepcopy(list(self.configs))


def _case(optimizer_cls: type[optim.Optimizer], variant: str, **options: Any) -> OptimizerCase:
    """Make a case; a list among the options has one value per model, anything else is shared."""
    switches = ("stacked", "matrices_only")
    configs = tuple(
        {
            key: value[model] if isinstance(value, list) else value
            for key, value in options.items()
            if key not in switches
        }
        for model in range(NUM_MODELS)
    )
    name = f"{optimizer_cls.__name__}-{variant}" if variant else optimizer_cls.__name__
    return OptimizerCase(name, optimizer_cls, configs, **{key: options[key] for key in switches if key in options})


_LRS = [0.05, 0.01, 0.002]
_DECAYS = [0.0, 0.02, 0.3]
_BETAS = [(0.9, 0.999), (0.5, 0.9), (0.95, 0.7)]
_EPS = [1e-8, 1e-3, 1e-5]

CASES: tuple[OptimizerCase, ...] = (
    _case(optim.SGD, "defaults"),
    _case(optim.SGD, "lr", lr=_LRS),
    _case(optim.SGD, "decay", lr=_LRS, weight_decay=_DECAYS),
    _case(optim.SGD, "shared-decay", lr=_LRS, weight_decay=0.1),
    _case(optim.SGD, "momentum", lr=_LRS, momentum=[0.9, 0.5, 0.99]),
    _case(optim.SGD, "shared-momentum", lr=_LRS, momentum=0.9, weight_decay=1e-4),
    _case(optim.SGD, "some-momentum", lr=_LRS, momentum=[0.9, 0.0, 0.5], weight_decay=_DECAYS),
    _case(optim.SGD, "dampening", lr=_LRS, momentum=0.9, dampening=[0.0, 0.3, 0.9]),
    _case(optim.SGD, "shared-dampening", lr=_LRS, momentum=0.9, dampening=0.5),
    _case(optim.SGD, "dampening-without-momentum", lr=_LRS, dampening=0.5),
    _case(optim.SGD, "some-momentum-dampening", lr=_LRS, momentum=[0.0, 0.9, 0.5], dampening=[0.5, 0.2, 0.0]),
    _case(optim.SGD, "nesterov", lr=_LRS, momentum=[0.9, 0.5, 0.99], nesterov=True),
    _case(optim.SGD, "shared-nesterov", lr=_LRS, momentum=0.9, nesterov=True, weight_decay=_DECAYS),
    _case(optim.SGD, "maximize", lr=_LRS, maximize=True, momentum=0.9, weight_decay=_DECAYS),
    _case(optim.SGD, "tensor-lr", lr=[torch.tensor(lr, dtype=torch.float64) for lr in _LRS], momentum=0.9),
    _case(optim.Adam, "defaults"),
    _case(optim.Adam, "lr", lr=_LRS),
    _case(optim.Adam, "all", lr=_LRS, betas=_BETAS, eps=_EPS, weight_decay=_DECAYS),
    _case(optim.Adam, "shared", lr=0.03, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
    _case(optim.Adam, "amsgrad", lr=_LRS, betas=_BETAS, amsgrad=True),
    _case(optim.Adam, "maximize", lr=_LRS, maximize=True, weight_decay=_DECAYS),
    _case(optim.Adam, "decoupled", lr=_LRS, weight_decay=_DECAYS, decoupled_weight_decay=True),
    _case(optim.Adam, "no-averaging", lr=_LRS, betas=(0.0, 0.0)),
    _case(optim.Adam, "tensor-lr", lr=[torch.tensor(lr, dtype=torch.float64) for lr in _LRS]),
    _case(optim.AdamW, "defaults"),
    _case(optim.AdamW, "all", lr=_LRS, betas=_BETAS, eps=_EPS, weight_decay=_DECAYS),
    _case(optim.AdamW, "amsgrad", lr=_LRS, weight_decay=_DECAYS, amsgrad=True, maximize=True),
    _case(optim.RMSprop, "defaults"),
    _case(optim.RMSprop, "all", lr=_LRS, alpha=[0.99, 0.9, 0.5], eps=_EPS, weight_decay=_DECAYS),
    _case(optim.RMSprop, "centered", lr=_LRS, alpha=[0.99, 0.9, 0.5], eps=1e-3, centered=True),
    _case(optim.RMSprop, "momentum", lr=_LRS, momentum=[0.9, 0.5, 0.3], weight_decay=_DECAYS),
    _case(optim.RMSprop, "some-momentum", lr=_LRS, momentum=[0.9, 0.0, 0.3]),
    _case(optim.RMSprop, "centered-momentum", lr=_LRS, momentum=0.9, centered=True, eps=1e-3, maximize=True),
    _case(optim.Adagrad, "defaults"),
    _case(optim.Adagrad, "all", lr=_LRS, lr_decay=[0.0, 0.1, 1.0], weight_decay=_DECAYS, eps=_EPS),
    _case(optim.Adagrad, "accumulator", lr=_LRS, initial_accumulator_value=[0.0, 0.1, 2.0], maximize=True),
    _case(optim.Adadelta, "defaults"),
    _case(optim.Adadelta, "all", lr=[1.0, 0.5, 0.1], rho=[0.9, 0.5, 0.99], eps=_EPS, weight_decay=_DECAYS),
    _case(optim.Adadelta, "maximize", lr=[1.0, 0.5, 0.1], maximize=True),
    _case(optim.Adamax, "defaults"),
    _case(optim.Adamax, "all", lr=_LRS, betas=_BETAS, eps=_EPS, weight_decay=_DECAYS),
    _case(optim.Adamax, "maximize", lr=_LRS, maximize=True),
    _case(optim.NAdam, "defaults"),
    _case(
        optim.NAdam,
        "all",
        lr=_LRS,
        betas=_BETAS,
        eps=_EPS,
        weight_decay=_DECAYS,
        momentum_decay=[4e-3, 0.1, 0.0],
    ),
    _case(optim.NAdam, "decoupled", lr=_LRS, weight_decay=_DECAYS, decoupled_weight_decay=True),
    _case(optim.NAdam, "maximize", lr=_LRS, maximize=True),
    _case(optim.RAdam, "defaults"),
    _case(optim.RAdam, "all", lr=_LRS, betas=_BETAS, eps=_EPS, weight_decay=_DECAYS),
    _case(optim.RAdam, "decoupled", lr=_LRS, weight_decay=_DECAYS, decoupled_weight_decay=True),
    _case(optim.RAdam, "maximize", lr=_LRS, betas=(0.9, 0.9), maximize=True),
    # Models that differ in a switch, and classes without a rule.
    _case(optim.SGD, "some-nesterov", lr=_LRS, momentum=0.9, nesterov=[True, False, True], stacked=False),
    _case(optim.Adam, "some-amsgrad", lr=_LRS, amsgrad=[False, True, False], stacked=False),
    _case(optim.RMSprop, "some-centered", lr=_LRS, centered=[True, False, False], eps=1e-3, stacked=False),
    _case(optim.Adagrad, "some-maximize", lr=_LRS, maximize=[True, False, False], stacked=False),
    _case(optim.ASGD, "", lr=_LRS, lambd=1e-3, t0=5, stacked=False),
    _case(optim.Rprop, "", lr=_LRS, stacked=False),
    _case(optim.Adafactor, "", lr=_LRS, stacked=False),
    _case(optim.Muon, "", lr=_LRS, stacked=False, matrices_only=True),
)

NAMES: tuple[str, ...] = tuple(case.name for case in CASES)
STACKED_CASES: tuple[OptimizerCase, ...] = tuple(case for case in CASES if case.stacked)
"""Cases of the nine classes that a backend must update at once."""


SHAPES: dict[str, tuple[int, ...]] = {"weight": (4, 3), "bias": (4,), "gain": ()}
MATRIX_SHAPES: dict[str, tuple[int, ...]] = {"weight": (4, 3), "other": (4, 3)}


def starting_values(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    num_models: int = NUM_MODELS,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Initial parameters of all models, ``[num_models, ...]`` each."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(num_models, *shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs ``[8, 3]`` and targets ``[8, 4]`` of one training step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return (
        torch.randn(8, 3, generator=generator, dtype=dtype),
        torch.randn(8, 4, generator=generator, dtype=dtype),
    )


def loss(params: Mapping[str, Tensor], step: int) -> Tensor:
    """One model's loss on the step's batch; bounded growth, so that it may be maximised too."""
    inputs, targets = batch(step, params["weight"].dtype)
    outputs = inputs @ params["weight"].T
    if "other" in params:
        outputs = outputs.tanh() + inputs @ params["other"].T
    else:
        outputs = params["gain"] * (outputs + params["bias"])
    return (outputs - targets).abs().square().log1p().mean()


class StandInBatch:
    """What an optimizer needs of a ModelBatch: stacked parameters and a backend.

    Args:
        make_optimizer: The backend's function ``(optimizer_cls, configs, stacks, num_models)``.
        values: Initial parameters.
        frozen: Names of parameters without gradients.
    """

    def __init__(
        self,
        make_optimizer: Callable[..., optim.Optimizer],
        values: Mapping[str, Tensor] | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        values = starting_values() if values is None else values
        self.num_models = next(iter(values.values())).shape[0]
        self.stacked_params = {
            name: nn.Parameter(value.clone(), requires_grad=name not in frozen) for name, value in values.items()
        }
        self.backend = self
        self._make_optimizer = make_optimizer

    def make_optimizer(
        self, optimizer_cls: type[optim.Optimizer], configs: Sequence[Mapping[str, Any]]
    ) -> optim.Optimizer:
        """Return an optimizer of the backend."""
        return self._make_optimizer(optimizer_cls, configs, self.stacked_params, self.num_models)

    def model(self, index: int) -> dict[str, Tensor]:
        """One model's parameters, as views that autograd can see."""
        return {name: stack[index] for name, stack in self.stacked_params.items()}

    def backward(self, step: int, scale: Tensor | float = 1.0) -> None:
        """Leave every model's own gradient in the stacks; its loss may be multiplied by a number per model."""
        losses = torch.stack([loss(self.model(index), step) for index in range(self.num_models)])
        (losses * scale).sum().backward()

    def values(self) -> dict[str, Tensor]:
        """A copy of all parameters."""
        return {name: stack.detach().clone() for name, stack in self.stacked_params.items()}


def models_one_by_one(values: Mapping[str, Tensor]) -> list[dict[str, nn.Parameter]]:
    """The same models as parameters of their own."""
    count = next(iter(values.values())).shape[0]
    return [{name: nn.Parameter(value[index].clone()) for name, value in values.items()} for index in range(count)]
