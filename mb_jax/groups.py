"""Training models group after group, so that what a group works on stays in the caches of a CPU.

Models never talk to each other, so their order is free. Several steps of all models read and write every parameter, all
optimizer state and all activations once a step, from memory or a cache that cores share. Several steps of a few models,
and then of the next few, find everything where the step before has left it. (One step at a time the activations still
gain by it, but the state has to be brought to each group and back.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mb_jax.sharding import axis_of_models

# By measurement (docs/design/0006-xla-backend.md), on cores with 2 MiB of cache each.
_CACHE_BYTES = 3 << 19
_FEWEST_MODELS = 4
# One step at a time: so much more than the state must the activations be.
_ACTIVATIONS_PER_STATE = 8


class WorkingSet(NamedTuple):
    """What one model works on in a step, in bytes.

    Attributes:
        state: Trained parameters, their gradients and optimizer state.
        activations: What the forward pass computes.
    """

    state: int
    activations: int


def group_size(num_models: int, working_set: Callable[[], WorkingSet], *, repeats: bool) -> int:
    """Return how many models a CPU trains at a time, a divisor of their number; elsewhere all.

    Args:
        num_models: How many models one device has.
        working_set: Finds out that of one model, which takes a moment; not asked where there is nothing to choose.
        repeats: Whether a program makes several steps.

    Example:
        >>> group_size(64, lambda: WorkingSet(state=160_000, activations=200_000), repeats=True)
        4
    """
    if jax.default_backend() != "cpu" or num_models == 1:
        return num_models
    state, activations = working_set()
    if not repeats and activations < _ACTIVATIONS_PER_STATE * state:
        return num_models
    wanted = max(_FEWEST_MODELS, _CACHE_BYTES // max(state + activations, 1))
    fitting = [size for size in range(1, num_models) if num_models % size == 0 and wanted <= 2 * size <= 4 * wanted]
    return min(fitting, key=lambda size: abs(math.log(size / wanted)), default=num_models)


def in_groups(
    function: Callable[..., tuple[Any, Any]], inputs: tuple[Any, ...], outputs: Any, size: int, num_models: int
) -> Callable[..., tuple[Any, Any]]:
    """Make a function of ``size`` models one of ``num_models``, which runs it for one group after another.

    Args:
        function: ``(state, *others) -> (state, results)``. The new state takes the place of the old one.
        inputs: Where the arguments have the model axis, the first of them for the state: see `Layout.spread`.
        outputs: The same for the results.
        size: A divisor of ``num_models``.
        num_models: How many models there are.
    """

    def run(state: Any, *others: Any) -> tuple[Any, Any]:
        def train(state: Any, group: jax.Array) -> tuple[Any, Any]:
            first = group * size
            own = [_part(tree, axes, first, size) for tree, axes in zip((state, *others), inputs, strict=True)]
            new, results = function(*own)
            return _with_part(state, new, inputs[0], first), results

        state, results = jax.lax.scan(train, state, jnp.arange(num_models // size))
        return state, jax.tree.map(_side_by_side, results, _axes(outputs, results))

    return run if size < num_models else function


def _axes(specs: Any, tree: Any) -> Any:
    """For each leaf of a tree its model axis, -1 where it has none."""
    every = jax.tree.broadcast(specs, tree, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    return jax.tree.map(axis_of_models, every, is_leaf=lambda spec: isinstance(spec, PartitionSpec))


def _part(tree: Any, specs: Any, first: jax.Array, size: int) -> Any:
    def part(array: jax.Array, axis: int) -> jax.Array:
        return array if axis < 0 else jax.lax.dynamic_slice_in_dim(array, first, size, axis)

    return jax.tree.map(part, tree, _axes(specs, tree))


def _with_part(tree: Any, new: Any, specs: Any, first: jax.Array) -> Any:
    def replaced(array: jax.Array, part: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, part, first, axis)

    return jax.tree.map(replaced, tree, new, _axes(specs, tree))


def _side_by_side(array: jax.Array, axis: int) -> jax.Array:
    """Results ``[groups, ..., size, ...]`` as ``[..., num_models, ...]``."""
    moved = jnp.moveaxis(array, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
