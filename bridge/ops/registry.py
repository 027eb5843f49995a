"""Lowerings of torch operations to JAX, by operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from torch import Tensor
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch.utils import _pytree as pytree

from bridge.dtypes import as_jax_dtype

Lowering = Callable[..., Any]
"""``lowering(operation, *args, **kwargs)``: arrays in the places of tensors; returns an array or a tuple of them."""

F = TypeVar("F", bound=Lowering)

LOWERINGS: dict[Any, Lowering] = {}


@dataclass(frozen=True)
class Operation:
    """One call of a torch operation in a traced function.

    Attributes:
        target: The torch operation.
        result: What PyTorch returns for it, without values: a tensor or a tuple of tensors.
        inputs: The arguments, ``(args, kwargs)``, with tensors without values in the places of arrays.
        key: A random key of this call's own; None where nothing is drawn.
        convolution: How convolutions are computed, ``"native"`` or ``"matmul"``.
    """

    target: Any
    result: Any
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    key: jax.Array | None = None
    convolution: str = "native"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) result."""
        return tuple(self._first.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the (first) result."""
        return as_jax_dtype(self._first.dtype)

    @property
    def _first(self) -> Tensor:
        return self.result[0] if isinstance(self.result, (tuple, list)) else self.result

    @property
    def common_dtype(self) -> jnp.dtype:
        """The dtype to which PyTorch promotes all operands before it compares or combines them."""
        operands = [leaf for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, (Tensor, int, float, complex))]
        kind = ELEMENTWISE_TYPE_PROMOTION_KIND.NO_OPMATH
        return as_jax_dtype(elementwise_dtypes(*operands, type_promotion_kind=kind)[0])


def lowers(*targets: Any) -> Callable[[F], F]:
    """Register a lowering for torch operations (overloads, such as ``aten.add.Tensor``)."""

    def register(function: F) -> F:
        for target in targets:
            if target in LOWERINGS:
                raise ValueError(f"{target} has two lowerings")
            LOWERINGS[target] = function
        return function

    return register
