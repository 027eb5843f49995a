"""A compiled JAX function inside PyTorch's autograd: two programs, one forward and one for its vector-Jacobian product.

The forward program returns what the backward program needs, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bridge.arrays import to_jax, to_torch
from bridge.dtypes import torch_dtypes
from mb_torch.errors import InvalidState, Unsupported

Arrays = list[jax.Array]
Watch = Callable[[str], AbstractContextManager[Any]]


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
        place: Makes arrays of the gradients of outputs.
        read: Makes tensors of outputs and of the gradients of inputs.
        whole: Positions of the smooth inputs whose gradients are read by `to_torch` whatever ``read`` is.

    Example:
        >>> double = CompiledFunction(lambda inputs: Outputs([2 * inputs[0]], None))
        >>> x = torch.ones(3, requires_grad=True)
        >>> (y,), _ = double([x], [to_jax(x)])
        >>> y.sum().backward()
        >>> x.grad
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        reached: Sequence[set[int]] | None = None,
        *,
        place: Callable[[Tensor], jax.Array] = to_jax,
        read: Callable[[jax.Array], Tensor] = to_torch,
        whole: Collection[int] = (),
    ) -> None:
        self._reached = reached
        self._place, self.read, self._whole = place, read, whole

        def forward_with_vjp(smooth: Arrays, *others: Any) -> tuple[Arrays, Any, Any]:
            def outputs(smooth: Arrays) -> tuple[Arrays, Any]:
                result = function(smooth, *others)
                return result.smooth, result.rest

            results, vjp, rest = jax.vjp(outputs, smooth, has_aux=True)
            return results, vjp, rest

        self._forward = jax.jit(function)
        self._forward_with_vjp = jax.jit(forward_with_vjp)
        self._backward = jax.jit(lambda vjp, cotangents: vjp(cotangents)[0])

    def __call__(
        self, tensors: Sequence[Tensor], smooth: Arrays, *others: Any, watch: Watch = nullcontext
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Run the function.

        Args:
            tensors: What PyTorch knows the smooth inputs as; those that require gradients get them.
            smooth: The same as arrays.
            *others: Further arguments of the function.
            watch: A context in which each program is called; it may be entered in the backward pass, too.

        Returns:
            The smooth outputs as tensors, and the rest as arrays.
        """
        with torch_dtypes(), watch("forward"):
            if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
                result = self._forward(smooth, *others)
                return tuple(self.read(array) for array in result.smooth), result.rest
            results, vjp, rest = self._forward_with_vjp(smooth, *others)
        return _Apply.apply(_Call(self, results, vjp, watch), *tensors), rest

    def gradients(
        self, vjp: Any, like: Sequence[Tensor], cotangents: Sequence[Tensor | None], watch: Watch = nullcontext
    ) -> list[Tensor | None]:
        """The gradients of all smooth inputs, from those of the outputs; None where none flows."""
        arrays = [
            self._place(torch.zeros_like(output) if cotangent is None else cotangent.conj())
            for output, cotangent in zip(like, cotangents, strict=True)
        ]
        with torch_dtypes(), watch("backward"):
            try:
                grads = self._backward(vjp, arrays)
            except RuntimeError as error:
                if "deleted" not in str(error):
                    raise
                raise InvalidState(
                    "backward() after the parameters of its forward pass were updated",
                    fix="Call backward() before optimizer.step(), or run the forward pass again.",
                ) from error
        differentiated = [index for index, cotangent in enumerate(cotangents) if cotangent is not None]
        flows = None if self._reached is None else set().union(*(self._reached[index] for index in differentiated))
        return [
            _conjugate((to_torch if index in self._whole else self.read)(grad))
            if flows is None or index in flows
            else None
            for index, grad in enumerate(grads)
        ]


def _conjugate(grad: Tensor) -> Tensor:
    # PyTorch's gradient of a complex tensor is the conjugate of JAX's.
    return grad.conj().resolve_conj() if grad.is_complex() else grad


class _Call:
    """One run of the forward program, until its graph is freed."""

    def __init__(self, function: CompiledFunction, results: Arrays, vjp: Any, watch: Watch) -> None:
        self.function = function
        self.watch = watch
        self.results = [function.read(array) for array in results]
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
        grads = call.function.gradients(call.vjp, call.results, cotangents, call.watch)
        return None, *(grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True))  # type: ignore[attr-defined]
