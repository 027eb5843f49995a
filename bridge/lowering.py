"""Runs a traced function in JAX, operation by operation."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor, fx

import bridge.ops  # noqa: F401  (registers the lowerings)
from bridge.dtypes import as_jax_dtype
from bridge.ops.random import is_random
from bridge.ops.registry import LOWERINGS, Operation
from bridge.trace import Traced


def missing(traced: Traced) -> list[Any]:
    """The operations of a traced function that have no lowering, each once."""
    return sorted({node.target for node in traced.operations if node.target not in LOWERINGS}, key=str)


def run(
    traced: Traced,
    inputs: Sequence[jax.Array],
    key: jax.Array | None = None,
    *,
    constants: Mapping[str, jax.Array] | None = None,
    convolution: str = "native",
) -> list[jax.Array]:
    """Compute what a traced function returns; itself traceable by `jax.jit`, `jax.vmap` and `jax.grad`.

    Args:
        traced: From `bridge.trace.trace`, with a lowering for every operation.
        inputs: Arrays in the places of the inputs, of the same shapes and dtypes.
        key: Random key of this call; needed if ``traced.draws``.
        constants: ``traced.constants`` as arrays; needed if there are any.
        convolution: How convolutions are computed, ``"native"`` or ``"matmul"``.

    Returns:
        One array per output.
    """
    remaining = iter(inputs)
    values: dict[fx.Node, Any] = {}
    drawn = 0
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "get_attr":
            values[node] = (constants or {})[node.target]
        elif node.op == "output":
            return [values[result] for result in node.args[0]]
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            own_key = None
            if is_random(node.target):
                assert key is not None
                own_key, drawn = jax.random.fold_in(key, drawn), drawn + 1
            values[node] = _apply(node, values, own_key, convolution)
    raise AssertionError("a graph ends with its output")


def _apply(node: fx.Node, values: dict[fx.Node, Any], key: jax.Array | None, convolution: str) -> Any:
    look_up = functools.partial(fx.node.map_arg, fn=lambda argument: values[argument])
    operation = Operation(
        target=node.target,
        result=node.meta["val"],
        inputs=fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"]),
        key=key,
        convolution=convolution,
    )
    result = LOWERINGS[node.target](operation, *look_up(node.args), **look_up(node.kwargs))
    return _checked(node, result)


def _checked(node: fx.Node, result: Any) -> Any:
    """The result with the dtypes that PyTorch gives it; an error of ours if the shapes are others."""
    expected = node.meta["val"]
    if isinstance(expected, (tuple, list)):
        return tuple(_as_expected(node, one, own) for one, own in zip(result, expected, strict=True))
    return _as_expected(node, result, expected)


def _as_expected(node: fx.Node, result: Any, expected: Any) -> Any:
    if not isinstance(expected, Tensor):
        return result
    array = jnp.asarray(result)
    if array.shape != tuple(expected.shape):
        raise AssertionError(f"lowering of {node.target}: shape {array.shape}, PyTorch has {tuple(expected.shape)}")
    return array.astype(as_jax_dtype(expected.dtype))


__all__ = ["missing", "run"]
