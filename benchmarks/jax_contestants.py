"""Contestants that train with JAX: ours, and what one would write by hand.

Whoever trains PyTorch models has PyTorch's tensors, so all are given those: by hand they become arrays within the
timed step, without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import torch
from torch import Tensor

from benchmarks import flax_networks
from benchmarks.contestants import Contestant, DocumentedStep, TrainStep
from benchmarks.workloads import Batch, Workload

Tree = Any


class OnJax(Contestant):
    """A contestant whose results are computed by JAX, which returns before they are there."""

    def wait(self) -> None:
        super().wait()
        # A step's losses may be there before its update is.
        jax.block_until_ready(jax.live_arrays())


class ByHand(OnJax):
    """One jitted function of stacked parameters, with gradients and optax's update under `jax.vmap`.

    Parameters, statistics and the optimizer's state are donated; every model has its own learning rate.
    """

    def __init__(self, workload: Workload) -> None:
        # A program of its own would say once which precision it wants; here several may share a process.
        self.precise = workload.dtype == "float64"
        model, transformation = flax_networks.network(workload), workload.recipe.on_optax()
        states = [{name: value.cpu().numpy() for name, value in own.state_dict().items()} for own in workload.models()]
        example = np.zeros((workload.batch, *workload.input_shape), workload.dtype)

        def loss_of(params: Tree, others: Tree, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, Tree]:
            logits, others = model.apply({"params": params, **others}, inputs, mutable=list(others))
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), others

        def train_one(carried: Tree, rate: jax.Array, inputs: jax.Array, targets: jax.Array) -> Tree:
            params, others, state = carried
            losses = jax.value_and_grad(loss_of, has_aux=True)
            (loss, others), gradients = losses(params, others, inputs, targets)
            directions, state = transformation.update(gradients, state, params)
            updates = jax.tree.map(lambda direction: -rate * direction, directions)
            return (optax.apply_updates(params, updates), others, state), loss

        data = None if workload.shared_input else 0
        self.train_all = jax.vmap(train_one, in_axes=(0, 0, data, data))
        self.compiled = jax.jit(self.train_all, donate_argnums=0)
        with jax.enable_x64(self.precise):
            self.rates = jnp.array(workload.learning_rates, workload.dtype)
            params, others = flax_networks.split(flax_networks.variables_of(model, example, states))
            self.carried = (params, others, jax.vmap(transformation.init)(params))

    def step(self, inputs: Tensor, targets: Tensor) -> jax.Array:
        with jax.enable_x64(self.precise):
            self.carried, losses = self.compiled(self.carried, self.rates, as_array(inputs), as_array(targets))
        return losses

    def losses(self, returned: Any) -> npt.NDArray[Any]:
        return np.stack([np.asarray(losses) for losses in returned])

    def states(self) -> Sequence[Mapping[str, Tensor]]:
        params, others, _ = jax.device_get(self.carried)
        states = flax_networks.states_of({"params": params, **others})
        return [{name: torch.tensor(value) for name, value in state.items()} for state in states]


class ByHandScan(ByHand):
    """By hand, with all steps of a call in one `jax.lax.scan`."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)

        def train(carried: Tree, rates: jax.Array, batches: tuple[jax.Array, jax.Array]) -> Tree:
            return jax.lax.scan(lambda carried, batch: self.train_all(carried, rates, *batch), carried, batches)

        self.scanned = jax.jit(train, donate_argnums=0)

    def run(self, batches: Sequence[Batch]) -> jax.Array:
        stacks = tuple(as_array(torch.stack(column)) for column in zip(*batches, strict=True))
        with jax.enable_x64(self.precise):
            self.carried, losses = self.scanned(self.carried, self.rates, stacks)
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
