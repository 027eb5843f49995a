"""A compiled JAX function inside PyTorch's autograd: two programs, one forward and one for its vector-Jacobian product.

The forward program returns what the backward program needs, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bridge.arrays import to_jax, to_torch
from bridge.dtypes import as_jax_dtype, torch_dtypes
from mb_torch.errors import Unsupported

Arrays = list[jax.Array]


class Outputs(NamedTuple):
    """What a `CompiledFunction`'s JAX function returns.

    Attributes:
        smooth: Float and complex results, through which gradients flow.
        rest: Any pytree of arrays without gradients.
    """

    smooth: Arrays
    rest: Any


class CompiledFunction:
    """A JAX function, compiled, that PyTorch can differentiate.

    Args:
        function: ``function(smooth_inputs, *others) -> Outputs``; gradients are taken with respect to the first
            argument, a list of arrays.
        reached: For each smooth output the positions of the smooth inputs it depends on; as in PyTorch, inputs that
            no differentiated output depends on get no gradient instead of zeros. Default: all depend on all.

    Example:
        >>> double = CompiledFunction(lambda inputs: Outputs([2 * inputs[0]], None))
        >>> x = torch.ones(3, requires_grad=True)
        >>> (y,), _ = double([x], [to_jax(x)])
        >>> y.sum().backward()
        >>> x.grad
        tensor([2., 2., 2.])
    """

    def __init__(self, function: Callable[..., Outputs], reached: Sequence[set[int]] | None = None) -> None:
        self._reached = reached

        def forward_with_vjp(smooth: Arrays, *others: Any) -> tuple[Arrays, Any, Any]:
            def outputs(smooth: Arrays) -> tuple[Arrays, Any]:
                result = function(smooth, *others)
                return result.smooth, result.rest

            results, vjp, rest = jax.vjp(outputs, smooth, has_aux=True)
            return results, vjp, rest

        self._forward = jax.jit(function)
        self._forward_with_vjp = jax.jit(forward_with_vjp)
        self._backward = jax.jit(lambda vjp, cotangents: vjp(cotangents)[0])

    def __call__(self, tensors: Sequence[Tensor], smooth: Arrays, *others: Any) -> tuple[tuple[Tensor, ...], Any]:
        """Run the function.

        Args:
            tensors: What PyTorch knows the smooth inputs as; those that require gradients get them.
            smooth: The same as arrays.
            *others: Further arguments of the function.

        Returns:
            The smooth outputs as tensors, and the rest as arrays.
        """
        with torch_dtypes():
            if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
                result = self._forward(smooth, *others)
                return tuple(to_torch(array) for array in result.smooth), result.rest
            results, vjp, rest = self._forward_with_vjp(smooth, *others)
        return _Apply.apply(_Call(self, results, vjp), *tensors), rest

    def gradients(self, vjp: Any, like: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all smooth inputs, from those of the outputs; None where none flows."""
        arrays = [
            jnp.zeros(output.shape, as_jax_dtype(output.dtype)) if cotangent is None else to_jax(cotangent.conj())
            for output, cotangent in zip(like, cotangents, strict=True)
        ]
        with torch_dtypes():
            grads = self._backward(vjp, arrays)
        differentiated = [index for index, cotangent in enumerate(cotangents) if cotangent is not None]
        flows = None if self._reached is None else set().union(*(self._reached[index] for index in differentiated))
        return [
            _conjugate(to_torch(grad)) if flows is None or index in flows else None for index, grad in enumerate(grads)
        ]


def _conjugate(grad: Tensor) -> Tensor:
    # PyTorch's gradient of a complex tensor is the conjugate of JAX's.
    return grad.conj().resolve_conj() if grad.is_complex() else grad


class _Call:
    """One run of the forward program, until its graph is freed."""

    def __init__(self, function: CompiledFunction, results: Arrays, vjp: Any) -> None:
        self.function = function
        self.results = [to_torch(array) for array in results]
        self.vjp = vjp


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.needs = [tensor.requires_grad for tensor in tensors]
        return tuple(call.results)

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise Unsupported(
                "create_graph=True: gradients of gradients do not reach through a compiled JAX function",
                fix="Use backend='torch' for this loss, or differentiate twice in JAX.",
            )
        call: _Call = ctx.call  # type: ignore[attr-defined]
        grads = call.function.gradients(call.vjp, call.results, cotangents)
        return None, *(grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True))  # type: ignore[attr-defined]
