"""The ways to train many models that are compared, each behind the same methods.

Every contestant starts from `workload.models()` and trains with Adam and cross entropy. Those that are not plain
PyTorch are imported where they are built: no worker process loads more than its own contestant needs.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from benchmarks import peers
from benchmarks.workloads import Batch, Workload

cross_entropy = nn.functional.cross_entropy
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam


# Steps in one call, of contestants that can make several.
TOGETHER = 20


class Contestant(ABC):
    """A way to train all models of a workload."""

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor) -> Any:
        """Train every model on one batch; return the losses, one number a model."""

    def run(self, batches: Sequence[Batch]) -> Any:
        """Train every model on some batches, at most `TOGETHER`; return what `losses` reads."""
        return [self.step(inputs, targets) for inputs, targets in batches]

    def wait(self) -> None:
        """Return when all that was asked for has been computed."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def losses(self, returned: Any) -> npt.NDArray[Any]:
        """The losses of one `run`, `[steps, num_models]`."""
        steps = [losses if isinstance(losses, Tensor) else torch.stack([*losses]) for losses in returned]
        return np.stack([losses.detach().cpu().numpy() for losses in steps])

    @abstractmethod
    def weights(self) -> list[dict[str, Tensor]]:
        """Each model's parameters by name."""


class Loop(Contestant):
    """One model after another, each with its own `torch.optim.Adam`."""

    def __init__(self, workload: Workload) -> None:
        self.models = workload.models()
        self.optimizers = [
            torch.optim.Adam(model.parameters(), lr=rate)
            for model, rate in zip(self.models, workload.learning_rates, strict=True)
        ]

    def step(self, inputs: Tensor, targets: Tensor) -> Sequence[Tensor]:
        losses = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss)
        return losses

    def weights(self) -> list[dict[str, Tensor]]:
        return [dict(model.named_parameters()) for model in self.models]


class ByHand(Contestant):
    """`vmap(grad_and_value(loss))` over stacked parameters, as `torch.func`'s documentation shows it."""

    def __init__(self, workload: Workload) -> None:
        models = workload.models()
        self.num_models = workload.num_models
        self.params = {name: p.detach() for name, p in stack_module_state(models)[0].items()}
        skeleton = copy.deepcopy(models[0]).to("meta")

        def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(functional_call(skeleton, params, (inputs,)), targets)

        self.gradients_and_losses: Callable[[dict[str, Tensor], Tensor, Tensor], tuple[dict[str, Tensor], Tensor]]
        self.gradients_and_losses = vmap(grad_and_value(loss), in_dims=(0, None, None))

    def weights(self) -> list[dict[str, Tensor]]:
        return [{name: p[model] for name, p in self.params.items()} for model in range(self.num_models)]


class ByHandOneRate(ByHand):
    """By hand, with `torch.optim.Adam` over the stacks; all models share the learning rate.

    Args:
        workload: What to train.
        fused: Whether Adam's update is one kernel.
    """

    def __init__(self, workload: Workload, *, fused: bool = False) -> None:
        super().__init__(workload)
        rates = set(workload.learning_rates)
        if len(rates) > 1:
            raise ValueError(f"torch.optim.Adam over stacks has one learning rate, not {len(rates)}")
        self.optimizer = torch.optim.Adam(self.params.values(), lr=rates.pop(), fused=fused)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        gradients, losses = self.gradients_and_losses(self.params, inputs, targets)
        for name, param in self.params.items():
            param.grad = gradients[name]
        self.optimizer.step()
        return losses


class ByHandRatePerModel(ByHand):
    """By hand, with Adam written out for a learning rate per model."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        rates = torch.tensor(workload.learning_rates, dtype=workload.torch_dtype, device=workload.device)
        self.rates = {name: rates.view(-1, *[1] * (p.dim() - 1)) for name, p in self.params.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.steps = 0

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        gradients, losses = self.gradients_and_losses(self.params, inputs, targets)
        self.steps += 1
        correction1 = 1 - BETA1**self.steps
        correction2 = (1 - BETA2**self.steps) ** 0.5
        for name, param in self.params.items():
            gradient, first, second = gradients[name], self.first[name], self.second[name]
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            scale = second.sqrt().div_(correction2).add_(EPS)
            direction = torch.div(first, scale, out=scale)
            param.addcmul_(direction, self.rates[name], value=-1 / correction1)
        return losses


class ByHandCompiled(ByHandRatePerModel):
    """By hand in one compiled function: gradients of all models and the update in place."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.compiled_step = torch.compile(self._step)

    def _step(self, inputs: Tensor, targets: Tensor, correction1: Tensor, correction2: Tensor) -> Tensor:
        gradients, losses = self.gradients_and_losses(self.params, inputs, targets)
        for name, param in self.params.items():
            gradient, first, second = gradients[name], self.first[name], self.second[name]
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            size = self.rates[name] / correction1
            param.sub_(size * first / (second.sqrt() / correction2 + EPS))
        return losses

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.steps += 1
        # Tensors, because changing Python numbers would compile the function anew at every step; made here, because
        # the compiler would work out the powers anew for every few elements.
        correction1 = torch.tensor(1 - BETA1**self.steps, dtype=inputs.dtype)
        correction2 = torch.tensor((1 - BETA2**self.steps) ** 0.5, dtype=inputs.dtype)
        losses: Tensor = self.compiled_step(inputs, targets, correction1, correction2)
        return losses


class DocumentedStep(Contestant):
    """The step that the documentation of `modelbatch` shows: forward, `compute_loss`, backward, optimizer.

    Args:
        workload: What to train.
        library: A module with `ModelBatch` and `OptimizerFactory`.
        options: More arguments of `ModelBatch`.
    """

    def __init__(self, workload: Workload, library: ModuleType, **options: Any) -> None:
        self.batch = library.ModelBatch(workload.models(), **options)
        configs = [{"lr": rate} for rate in workload.learning_rates]
        self.optimizer = library.OptimizerFactory(torch.optim.Adam).create_optimizer(self.batch, configs)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.batch.zero_grad()
        outputs = self.batch(inputs)
        loss = self.batch.compute_loss(outputs, targets, cross_entropy, reduction="sum")
        loss.backward()
        self.optimizer.step()
        losses: Tensor = self.batch.latest_losses
        return losses

    def weights(self) -> list[dict[str, Tensor]]:
        states: list[dict[str, Tensor]] = self.batch.get_model_states()
        return states


class TrainStep(DocumentedStep):
    """Our `make_train_step`.

    Args:
        workload: What to train.
        library: `mb_torch`.
        compiled: Whether `enable_compile()` was called.
        options: More arguments of `ModelBatch`.
    """

    def __init__(self, workload: Workload, library: ModuleType, *, compiled: bool = False, **options: Any) -> None:
        super().__init__(workload, library, **options)
        if compiled:
            self.batch.enable_compile()
        self.train_step = self.batch.make_train_step(cross_entropy, self.optimizer)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = self.train_step(inputs, targets)
        return losses


def _ours() -> ModuleType:
    import mb_torch

    return mb_torch


def _jax() -> ModuleType:
    from benchmarks import jax_contestants

    return jax_contestants


ON_TORCH: dict[str, Callable[[Any], Contestant]] = {
    "loop": Loop,
    "modelbatch 0.1.0": lambda workload: DocumentedStep(workload, peers.load("modelbatch")),
    "by hand, one Adam": ByHandOneRate,
    "by hand, one fused Adam": lambda workload: ByHandOneRate(workload, fused=True),
    "by hand, rate per model": ByHandRatePerModel,
    "by hand, compiled": ByHandCompiled,
    "ours, documented step": lambda workload: DocumentedStep(workload, _ours()),
    "ours, make_train_step": lambda workload: TrainStep(workload, _ours()),
    "ours, compiled": lambda workload: TrainStep(workload, _ours(), compiled=True),
}
# These cannot train models with different learning rates.
ONE_RATE = ["by hand, one Adam", "by hand, one fused Adam"]

ON_JAX: dict[str, Callable[[Any], Contestant]] = {
    "jax by hand": lambda workload: _jax().ByHand(workload),
    "jax by hand, scan": lambda workload: _jax().ByHandScan(workload),
    "ours on jax, documented step": lambda workload: _jax().OurDocumentedStep(workload, _ours()),
    "ours on jax, make_train_step": lambda workload: _jax().OurTrainStep(workload, _ours()),
    "ours on jax, step.run": lambda workload: _jax().OurRun(workload, _ours()),
}
# The same step, with a form of convolution that is chosen by name.
CONVOLUTIONS: dict[str, Callable[[Any], Contestant]] = {
    f"ours on jax, {form} convolutions": lambda workload, form=form: _jax().OurTrainStep(  # type: ignore[misc]
        workload, _ours(), backend_options={"convolution": form}
    )
    for form in ("native", "matmul")
}
CONTESTANTS = {**ON_TORCH, **ON_JAX, **CONVOLUTIONS}
