"""Contestants that train with JAX: ours, and what one would write by hand.

Whoever trains PyTorch models has PyTorch's tensors, so all are given those: by hand they become arrays within the
timed step, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import torch
from flax import linen
from torch import Tensor

from benchmarks.contestants import Contestant, DocumentedStep, TrainStep
from benchmarks.workloads import Batch, MLPs

Tree = Any


class OnJax(Contestant):
    """A contestant whose results are computed by JAX, which returns before they are there."""

    def wait(self) -> None:
        super().wait()
        # A step's losses may be there before its update is.
        jax.block_until_ready(jax.live_arrays())


class Classifier(linen.Module):
    """The model of `MLPs` in flax.

    Attributes:
        hidden: Width of the hidden layer.
        classes: Width of the output.
    """

    hidden: int
    classes: int

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = linen.relu(linen.Dense(self.hidden)(inputs))
        return linen.Dense(self.classes)(hidden)


# Where flax has the two layers, and their names in PyTorch.
LAYERS = {"Dense_0": "0", "Dense_1": "2"}


class ByHand(OnJax):
    """One jitted function of stacked parameters, with gradients and optax's Adam under `jax.vmap`.

    Parameters and Adam's state are donated; every model has its own learning rate.
    """

    def __init__(self, workload: MLPs) -> None:
        self.num_models = workload.num_models
        # A program of its own would say once which precision it wants; here several may share a process.
        self.precise = workload.dtype == "float64"
        model, adam = Classifier(workload.hidden, workload.classes), optax.scale_by_adam()
        states = [own.state_dict() for own in workload.models()]

        def loss_of(params: Tree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
            logits = model.apply({"params": params}, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        def train_one(params: Tree, state: Tree, rate: jax.Array, inputs: jax.Array, targets: jax.Array) -> Tree:
            loss, gradients = jax.value_and_grad(loss_of)(params, inputs, targets)
            directions, state = adam.update(gradients, state)
            updates = jax.tree.map(lambda direction: -rate * direction, directions)
            return optax.apply_updates(params, updates), state, loss

        self.train_all = jax.vmap(train_one, in_axes=(0, 0, 0, None, None))
        self.compiled = jax.jit(self.train_all, donate_argnums=(0, 1))
        with jax.enable_x64(self.precise):
            self.rates = jnp.array(workload.learning_rates)
            self.params = {
                layer: {
                    "kernel": jnp.stack([state[f"{name}.weight"].T.cpu().numpy() for state in states]),
                    "bias": jnp.stack([state[f"{name}.bias"].cpu().numpy() for state in states]),
                }
                for layer, name in LAYERS.items()
            }
            self.state = jax.vmap(adam.init)(self.params)

    def step(self, inputs: Tensor, targets: Tensor) -> jax.Array:
        with jax.enable_x64(self.precise):
            self.params, self.state, losses = self.compiled(
                self.params, self.state, self.rates, as_array(inputs), as_array(targets)
            )
        return losses

    def losses(self, returned: Any) -> npt.NDArray[Any]:
        return np.stack([np.asarray(losses) for losses in returned])

    def weights(self) -> list[dict[str, Tensor]]:
        params = jax.device_get(self.params)
        by_name = {f"{name}.weight": params[layer]["kernel"].swapaxes(1, 2) for layer, name in LAYERS.items()}
        by_name |= {f"{name}.bias": params[layer]["bias"] for layer, name in LAYERS.items()}
        return [{name: torch.tensor(own[model]) for name, own in by_name.items()} for model in range(self.num_models)]


class ByHandScan(ByHand):
    """By hand, with all steps of a call in one `jax.lax.scan`."""

    def __init__(self, workload: MLPs) -> None:
        super().__init__(workload)

        def train(params: Tree, state: Tree, rates: jax.Array, batches: tuple[jax.Array, jax.Array]) -> Tree:
            def body(carry: Tree, batch: tuple[jax.Array, jax.Array]) -> tuple[Tree, jax.Array]:
                (params, state), (inputs, targets) = carry, batch
                params, state, losses = self.train_all(params, state, rates, inputs, targets)
                return (params, state), losses

            (params, state), losses = jax.lax.scan(body, (params, state), batches)
            return params, state, losses

        self.scanned = jax.jit(train, donate_argnums=(0, 1))

    def run(self, batches: Sequence[Batch]) -> jax.Array:
        inputs, targets = (as_array(torch.stack(column)) for column in zip(*batches, strict=True))
        with jax.enable_x64(self.precise):
            self.params, self.state, losses = self.scanned(self.params, self.state, self.rates, (inputs, targets))
        return losses

    def losses(self, returned: Any) -> npt.NDArray[Any]:
        return np.asarray(returned)


def as_array(tensor: Tensor) -> Any:
    """The same memory for JAX."""
    return jax.dlpack.from_dlpack(tensor) if tensor.is_cuda else tensor.numpy()


class OurDocumentedStep(OnJax, DocumentedStep):
    """Our documented step with `backend="jax"`.

    Args:
        workload: What to train.
        library: `mb_torch`.
        options: More arguments of `ModelBatch`.
    """

    def __init__(self, workload: Any, library: ModuleType, **options: Any) -> None:
        super().__init__(workload, library, backend="jax", **options)


class OurTrainStep(OnJax, TrainStep):
    """Our `make_train_step` with `backend="jax"`.

    Args:
        workload: What to train.
        library: `mb_torch`.
        options: More arguments of `ModelBatch`.
    """

    def __init__(self, workload: Any, library: ModuleType, **options: Any) -> None:
        super().__init__(workload, library, backend="jax", **options)


class OurRun(OurTrainStep):
    """Our `step.run`: all steps of a call in one program."""

    def run(self, batches: Sequence[Batch]) -> Tensor:
        losses: Tensor = self.train_step.run(batches)
        return losses

    def losses(self, returned: Any) -> npt.NDArray[Any]:
        losses: npt.NDArray[Any] = returned.cpu().numpy()
        return losses
