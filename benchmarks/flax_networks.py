"""The networks of the workloads in flax, as one would write them by hand, and their states to and from PyTorch's names.

A layer has its name in PyTorch, so that only its leaves are called and laid out differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.workloads import CNNs, LSTMs, MLPs, ResNets, Transformers, Workload

Tree = Any
Arrays = dict[str, npt.NDArray[Any]]

# Leaves of flax, where it has them, and their names in PyTorch.
LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


class MLP(linen.Module):
    """Of `MLPs`."""

    hidden: int
    classes: int

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = linen.relu(linen.Dense(self.hidden, name="0")(inputs))
        return linen.Dense(self.classes, name="2")(hidden)


class BatchNorm(linen.Module):
    """BatchNorm over images `[batch, height, width, channels]`, in training, with PyTorch's statistics.

    Flax's own keeps the variance of the batch; PyTorch its unbiased estimate.
    """

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        channels = images.shape[-1:]
        dtype = images.dtype
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, dtype)
        mean, var = images.mean((0, 1, 2)), images.var((0, 1, 2))
        count = images.size / channels[0]
        running_mean.value = 0.9 * running_mean.value + 0.1 * mean
        running_var.value = 0.9 * running_var.value + 0.1 * var * count / (count - 1)
        scale = self.param("scale", linen.initializers.ones, channels, dtype)
        bias = self.param("bias", linen.initializers.zeros, channels, dtype)
        return (images - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


class CNN(linen.Module):
    """Of `CNNs`."""

    channels: tuple[int, int]
    classes: int
    batch_norm: bool

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = inputs.transpose(0, 2, 3, 1)
        layer = 0
        for channels in self.channels:
            hidden = linen.Conv(channels, (3, 3), padding=1, name=f"{layer}")(hidden)
            if self.batch_norm:
                layer += 1
                hidden = BatchNorm(name=f"{layer}")(hidden)
            hidden = linen.max_pool(linen.relu(hidden), (2, 2), (2, 2))
            layer += 3
        # As PyTorch flattens them.
        rows = hidden.transpose(0, 3, 1, 2).reshape(len(inputs), -1)
        return linen.Dense(self.classes, name=f"{layer + 1}")(rows)


class SequenceClassifier(linen.Module):
    """Of `Transformers`."""

    width: int
    heads: int
    hidden: int
    layers: int
    classes: int

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = inputs
        for number in range(self.layers):
            name = f"encoder.layers.{number}"
            attended = self._attention(hidden, f"{name}.self_attn")
            hidden = linen.LayerNorm(1e-5, name=f"{name}.norm1")(hidden + attended)
            wide = linen.relu(linen.Dense(self.hidden, name=f"{name}.linear1")(hidden))
            narrow = linen.Dense(self.width, name=f"{name}.linear2")(wide)
            hidden = linen.LayerNorm(1e-5, name=f"{name}.norm2")(hidden + narrow)
        return linen.Dense(self.classes, name="head")(hidden.mean(1))

    def _attention(self, inputs: jax.Array, name: str) -> jax.Array:
        together = linen.Dense(3 * self.width, name=f"{name}.in_proj")(inputs)
        by_head = (*inputs.shape[:2], self.heads, self.width // self.heads)
        query, key, value = (own.reshape(by_head) for own in jnp.split(together, 3, -1))
        # Written out: `jax.nn.dot_product_attention` has its softmax in float32, in float64 as well.
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value).reshape(inputs.shape)
        return linen.Dense(self.width, name=f"{name}.out_proj")(attended)


class RecurrentClassifier(linen.Module):
    """Of `LSTMs`. Flax's cells have one bias for PyTorch's two, which optimizers would move differently."""

    features: int
    hidden: int
    classes: int

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden, dtype, zeros = self.hidden, inputs.dtype, linen.initializers.zeros
        from_inputs = self.param("lstm.weight_ih_l0", zeros, (4 * hidden, self.features), dtype)
        from_state = self.param("lstm.weight_hh_l0", zeros, (4 * hidden, hidden), dtype)
        bias = self.param("lstm.bias_ih_l0", zeros, (4 * hidden,), dtype)
        bias += self.param("lstm.bias_hh_l0", zeros, (4 * hidden,), dtype)

        def step(carry: tuple[jax.Array, jax.Array], position: jax.Array) -> Tree:
            state, cell = carry
            gates = position + state @ from_state.T
            entering, forgetting, candidate, leaving = jnp.split(gates, 4, -1)
            cell = linen.sigmoid(forgetting) * cell + linen.sigmoid(entering) * jnp.tanh(candidate)
            return (linen.sigmoid(leaving) * jnp.tanh(cell), cell), None

        start = jnp.zeros((len(inputs), hidden), dtype)
        positions = (inputs @ from_inputs.T + bias).swapaxes(0, 1)
        (state, _), _ = jax.lax.scan(step, (start, start), positions)
        return linen.Dense(self.classes, name="head")(state)


class ResNet18(linen.Module):
    """Of `ResNets`."""

    width: int
    classes: int

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = self._convolution(inputs.transpose(0, 2, 3, 1), self.width, 3, 1, "1", "")
        hidden = linen.relu(hidden)
        for number in range(8):
            channels = self.width * 2 ** (number // 2)
            stride = 2 if number in (2, 4, 6) else 1
            block = f"blocks.{number}."
            inner = linen.relu(self._convolution(hidden, channels, 3, stride, "1", block))
            inner = self._convolution(inner, channels, 3, 1, "2", block)
            if hidden.shape[-1] != channels:
                hidden = self._convolution(hidden, channels, 1, stride, "3", block)
            hidden = linen.relu(inner + hidden)
        return linen.Dense(self.classes, name="head")(hidden.mean((1, 2)))

    def _convolution(
        self, images: jax.Array, channels: int, size: int, stride: int, number: str, block: str
    ) -> jax.Array:
        convolution = linen.Conv(
            channels, (size, size), stride, padding=size // 2, use_bias=False, name=f"{block}conv{number}"
        )
        return BatchNorm(name=f"{block}bn{number}")(convolution(images))


@singledispatch
def network(workload: Workload) -> linen.Module:
    """The network of a workload."""
    raise TypeError(f"{workload} has no network in flax")


@network.register
def _(workload: MLPs) -> linen.Module:
    return MLP(workload.hidden, workload.classes)


@network.register
def _(workload: CNNs) -> linen.Module:
    return CNN(workload.channels, workload.classes, workload.batch_norm)


@network.register
def _(workload: Transformers) -> linen.Module:
    return SequenceClassifier(workload.width, workload.heads, workload.hidden, workload.layers, workload.classes)


@network.register
def _(workload: LSTMs) -> linen.Module:
    return RecurrentClassifier(workload.features, workload.hidden, workload.classes)


@network.register
def _(workload: ResNets) -> linen.Module:
    return ResNet18(workload.width, workload.classes)


def variables_of(model: linen.Module, inputs: npt.NDArray[Any], states: list[Arrays]) -> Tree:
    """The collections of a network, stacked `[num_models, ...]`, with the values of PyTorch's states."""
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), inputs))
    return unflatten_dict(
        {path: jnp.asarray(np.stack([_to_flax(path, state[torch_name(path)]) for state in states])) for path in shapes}
    )


def states_of(variables: Tree) -> list[Arrays]:
    """PyTorch's states of all models, of collections `[num_models, ...]`."""
    stacks = {path: np.asarray(stack) for path, stack in flatten_dict(variables).items()}
    num_models = len(next(iter(stacks.values())))
    return [
        {torch_name(path): _to_torch(path, stack[model]) for path, stack in stacks.items()}
        for model in range(num_models)
    ]


def torch_name(path: tuple[str, ...]) -> str:
    """PyTorch's name of a leaf of flax: `("params", "0", "kernel")` is `"0.weight"`."""
    collection, *layer, leaf = path
    if not layer:
        return leaf
    (name,) = layer
    # Attention of PyTorch keeps these without a layer of their own.
    join = "_" if name.endswith("in_proj") else "."
    return f"{name}{join}{LEAVES[collection, leaf]}"


def _to_flax(path: tuple[str, ...], value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if path[-1] != "kernel":
        return value
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


def _to_torch(path: tuple[str, ...], value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if path[-1] != "kernel":
        return value
    return value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)


def split(variables: Mapping[str, Tree]) -> tuple[Tree, Tree]:
    """Parameters, and all other collections."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return variables["params"], others
