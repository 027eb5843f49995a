"""The ways to train many models that are compared, each behind the same methods.

Every contestant starts from `workload.models()` and trains with the workload's optimizer and cross entropy. Those that
are not plain PyTorch are imported where they are built: no worker process loads more than its own contestant needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    def states(self) -> Sequence[Mapping[str, Tensor]]:
        """Each model's parameters and statistics by name; what else there is does not matter."""

    def weights(self) -> list[dict[str, Tensor]]:
        """All of each model's state that is not a count."""
        return [{name: v for name, v in own.items() if v.is_floating_point()} for own in self.states()]


class Loop(Contestant):
    """One model after another, each with an optimizer of its own."""

    def __init__(self, workload: Workload) -> None:
        self.models = workload.models()
        self.shared_input = workload.shared_input
        recipe = workload.recipe
        self.optimizers = [
            recipe.optimizer(model.parameters(), lr=rate, **recipe.options)
            for model, rate in zip(self.models, workload.learning_rates, strict=True)
        ]

    def step(self, inputs: Tensor, targets: Tensor) -> Sequence[Tensor]:
        losses = []
        for index, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            own_inputs, own_targets = (inputs, targets) if self.shared_input else (inputs[index], targets[index])
            optimizer.zero_grad()
            loss = cross_entropy(model(own_inputs), own_targets)
            loss.backward()
            optimizer.step()
            losses.append(loss)
        return losses

    def states(self) -> Sequence[Mapping[str, Tensor]]:
        return [model.state_dict() for model in self.models]


class ByHand(Contestant):
    """`vmap(grad_and_value(loss))` over stacked parameters, as `torch.func`'s documentation shows it."""

    def __init__(self, workload: Workload) -> None:
        self.num_models = workload.num_models
        params, self.buffers = stack_module_state(workload.models())
        self.params = {name: p.detach() for name, p in params.items()}
        skeleton = workload.written_out()

        def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(functional_call(skeleton, (params, buffers), (inputs,)), targets)

        data = None if workload.shared_input else 0
        self._gradients_and_losses = vmap(grad_and_value(loss), in_dims=(0, 0, data, data))

    def gradients_and_losses(self, inputs: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients by name and losses of all models; statistics among the buffers are updated in place."""
        found: tuple[dict[str, Tensor], Tensor] = self._gradients_and_losses(self.params, self.buffers, inputs, targets)
        return found

    def states(self) -> Sequence[Mapping[str, Tensor]]:
        stacks = {**self.params, **self.buffers}
        return [{name: stack[model] for name, stack in stacks.items()} for model in range(self.num_models)]


class ByHandOneRate(ByHand):
    """By hand, with PyTorch's optimizer over the stacks; all models share the learning rate.

    Args:
        workload: What to train.
        fused: Whether the optimizer's update is one kernel.
    """

    def __init__(self, workload: Workload, *, fused: bool = False) -> None:
        super().__init__(workload)
        rates = set(workload.learning_rates)
        if len(rates) > 1:
            raise ValueError(f"an optimizer over stacks has one learning rate, not {len(rates)}")
        recipe = workload.recipe
        self.optimizer = recipe.optimizer(self.params.values(), lr=rates.pop(), fused=fused, **recipe.options)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        gradients, losses = self.gradients_and_losses(inputs, targets)
        for name, param in self.params.items():
            param.grad = gradients[name]
        self.optimizer.step()
        return losses


class ByHandRatePerModel(ByHand):
    """By hand, with the update written out for a learning rate per model."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        rates = torch.tensor(workload.learning_rates, dtype=workload.torch_dtype, device=workload.device)
        self.update = workload.recipe.update(self.params, rates, workload.recipe.options)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        gradients, losses = self.gradients_and_losses(inputs, targets)
        self.update.apply(gradients, *self.update.next_numbers())
        return losses


class ByHandCompiled(ByHandRatePerModel):
    """By hand in one compiled function: gradients of all models and the update in place."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.compiled_step = torch.compile(self._step)

    def _step(self, inputs: Tensor, targets: Tensor, *numbers: Tensor) -> Tensor:
        gradients, losses = self.gradients_and_losses(inputs, targets)
        self.update.apply_traced(gradients, *numbers)
        return losses

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # Tensors, because changing Python numbers would compile the function anew at every step; made here, because
        # the compiler would work out the powers anew for every few elements.
        numbers = [torch.tensor(number, dtype=inputs.dtype) for number in self.update.next_numbers()]
        losses: Tensor = self.compiled_step(inputs, targets, *numbers)
        return losses


class DocumentedStep(Contestant):
    """The step that the documentation of `modelbatch` shows: forward, `compute_loss`, backward, optimizer.

    Args:
        workload: What to train.
        library: A module with `ModelBatch` and `OptimizerFactory`.
        options: More arguments of `ModelBatch`.
    """

    def __init__(self, workload: Workload, library: ModuleType, **options: Any) -> None:
        recipe = workload.recipe
        self.batch = library.ModelBatch(workload.models(), shared_input=workload.shared_input, **options)
        # `modelbatch` 0.1.0 gives what is common to `torch.optim`'s constructor as well, which for SGD needs a rate.
        configs = [{"lr": rate, **recipe.options} for rate in workload.learning_rates]
        self.optimizer = library.OptimizerFactory(recipe.optimizer).create_optimizer(self.batch, configs)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.batch.zero_grad()
        outputs = self.batch(inputs)
        loss = self.batch.compute_loss(outputs, targets, cross_entropy, reduction="sum")
        loss.backward()
        self.optimizer.step()
        losses: Tensor = self.batch.latest_losses
        return losses

    def states(self) -> Sequence[Mapping[str, Tensor]]:
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


class TorchMB(Contestant):
    """`torchmb` 0.2 as its README shows it: a batched module, `batch_loss`, and an optimizer over the stacks."""

    def __init__(self, workload: Workload) -> None:
        rates = set(workload.learning_rates)
        if len(rates) > 1:
            raise ValueError(f"an optimizer over stacks has one learning rate, not {len(rates)}")
        torchmb = peers.load("torchmb")
        models, recipe = workload.models(), workload.recipe
        self.num_models, self.shared_input = workload.num_models, workload.shared_input
        self.batch = torchmb.BatchModule(workload.models()[0], batch=self.num_models)
        self.batch.load_state_dicts([model.state_dict() for model in models])
        self.batch.to(workload.torch_dtype)
        self.batch_loss = torchmb.batch_loss
        self.optimizer = recipe.optimizer(self.batch.parameters(), lr=rates.pop(), **recipe.options)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.shared_input:
            inputs, targets = (data.expand(self.num_models, *data.shape) for data in (inputs, targets))
        self.optimizer.zero_grad()
        losses: Tensor = self.batch_loss(self.batch(inputs), targets, self.num_models, cross_entropy, "mean")
        losses.sum().backward()
        self.optimizer.step()
        return losses

    def states(self) -> Sequence[Mapping[str, Tensor]]:
        states: list[dict[str, Tensor]] = self.batch.state_dicts()
        return states


def _ours() -> ModuleType:
    import mb_torch

    return mb_torch


def _jax() -> ModuleType:
    from benchmarks import jax_contestants

    return jax_contestants


def _trainer() -> ModuleType:
    from benchmarks import trainer_contestants

    return trainer_contestants


ON_TORCH: dict[str, Callable[[Any], Contestant]] = {
    "loop": Loop,
    "modelbatch 0.1.0": lambda workload: DocumentedStep(workload, peers.load("modelbatch")),
    "torchmb 0.2": TorchMB,
    "by hand, one optimizer": ByHandOneRate,
    "by hand, one fused optimizer": lambda workload: ByHandOneRate(workload, fused=True),
    "by hand, rate per model": ByHandRatePerModel,
    "by hand, compiled": ByHandCompiled,
    "ours, documented step": lambda workload: DocumentedStep(workload, _ours()),
    "ours, make_train_step": lambda workload: TrainStep(workload, _ours()),
    "ours, compiled": lambda workload: TrainStep(workload, _ours(), compiled=True),
}
# These cannot train models with different learning rates.
ONE_RATE = ["torchmb 0.2", "by hand, one optimizer", "by hand, one fused optimizer"]

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
# A trainer that makes the steps of `loop` and of our `make_train_step`.
TRAINED: dict[str, Callable[[Any], Contestant]] = {
    "GenericTrainer": lambda workload: _trainer().TrainedModule(workload),
    "GenericTrainer of a batch": lambda workload: _trainer().TrainedBatch(workload),
}
CONTESTANTS = {**ON_TORCH, **ON_JAX, **CONVOLUTIONS, **TRAINED}
