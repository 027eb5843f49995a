"""A user's own `torch.autograd.Function`: its forward is recorded in place, its backward becomes the gradient."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bridge.arrays import to_jax
from bridge.ops.registry import Operation, lowers
from mb_torch.errors import Unsupported

if TYPE_CHECKING:
    from bridge.trace import Traced

_LIBRARY = torch.library.Library("bridge", "FRAGMENT")
_LIBRARY.define("own_gradient(Tensor[] outputs, Tensor[] inputs, Tensor[] saved, int number) -> Tensor[]")

own_gradient = torch.ops.bridge.own_gradient.default
"""The outputs, with the recorded backward of that number as their gradient with respect to the inputs."""

_BACKWARDS: list[Traced] = []
_NUMBERS: dict[Hashable, int] = {}
"""The same backward gets the same number, so that graphs recorded again are equal."""


def _results(outputs: Sequence[Tensor], inputs: Sequence[Tensor], saved: Sequence[Tensor], number: int) -> list[Tensor]:
    return [torch.empty_like(output) for output in outputs]


def _no_backward(*_: Any) -> Any:
    raise AssertionError("only recorded, never run in PyTorch")


torch.library.register_fake("bridge::own_gradient", _results, lib=_LIBRARY)
# So that results require gradients where PyTorch's would.
torch.library.register_autograd("bridge::own_gradient", _no_backward, lib=_LIBRARY)


class _Context:
    """What ``forward`` and ``backward`` of a Function get as ``ctx``."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.fixed: tuple[Tensor, ...] = ()
        self.changed: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        """For forward-mode differentiation, which nothing here uses."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.fixed = tensors

    def mark_dirty(self, *tensors: Tensor) -> None:
        self.changed = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """A backward that takes None for a gradient that is not there takes zeros as well, which it always gets."""


def record_function(function: type[torch.autograd.Function], arguments: Sequence[Any]) -> Any:
    """Record ``function.apply(*arguments)``.

    Args:
        function: The user's class, with or without ``setup_context``.
        arguments: As the user gives them.

    Returns:
        What ``forward`` returns, with ``backward`` as its gradient.

    Raises:
        Unsupported: ``forward`` changes its arguments in place, or ``backward`` cannot be recorded.
    """
    needed = tuple(isinstance(argument, Tensor) and _inexact(argument) for argument in arguments)
    context = _Context(needed)
    given = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
    with torch.no_grad():
        if function.setup_context is torch.autograd.Function.setup_context:
            outputs = function.forward(context, *given)
        else:
            outputs = function.forward(*given)
            function.setup_context(context, tuple(given), outputs)
    if context.changed:
        raise _unsupported(function, "its forward changes arguments in place")
    if not any(needed) or not torch.is_grad_enabled():
        return outputs
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    linked = _linked(function, context, several, arguments)
    return linked if isinstance(outputs, tuple) else linked[0]


def _linked(
    function: type[torch.autograd.Function], context: _Context, outputs: tuple[Any, ...], arguments: Sequence[Any]
) -> tuple[Any, ...]:
    """The outputs, recorded as having the gradient that ``backward`` computes."""
    fixed = {id(tensor) for tensor in context.fixed}
    context.fixed = ()
    # Gradients go through outputs of real or complex numbers that are not excluded.
    through = [
        place
        for place, output in enumerate(outputs)
        if isinstance(output, Tensor) and _inexact(output) and id(output) not in fixed
    ]
    if not through:
        return outputs
    inputs = [argument for argument, needed in zip(arguments, context.needs_input_grad, strict=True) if needed]
    backward = _Backward(function, context, outputs, through, inputs)
    saved = [tensor.detach() for tensor in backward.take_saved()]
    # What this thread records, and how, is none of the backward's business.
    with ThreadPoolExecutor(1) as elsewhere:
        number = elsewhere.submit(backward.number).result()
    results = own_gradient([outputs[place].detach() for place in through], inputs, saved, number)
    linked = list(outputs)
    for place, result in zip(through, results, strict=True):
        linked[place] = result
    return tuple(linked)


class _Form:
    """Shape and dtype of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape}"

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class _Backward:
    """The backward of one call of a Function: from what was saved and the gradients of outputs to those of inputs."""

    def __init__(
        self,
        function: type[torch.autograd.Function],
        context: _Context,
        outputs: tuple[Any, ...],
        through: Sequence[int],
        inputs: Sequence[Tensor],
    ) -> None:
        self._function = function
        self._through = through
        self._outputs = [_Form(output) if isinstance(output, Tensor) else None for output in outputs]
        self._wanted = [place for place, needed in enumerate(context.needs_input_grad) if needed]
        self._inputs = [_Form(tensor) for tensor in inputs]
        # Tensors in attributes of the context are saved like those that are given to `save_for_backward`.
        self._context = context
        self._state, self._structure = pytree.tree_flatten(vars(context))
        self._places = [place for place, leaf in enumerate(self._state) if isinstance(leaf, Tensor)]
        self._saved = [_Form(self._state[place]) for place in self._places]

    def take_saved(self) -> list[Tensor]:
        """The tensors that the call saved; from then on they are inputs."""
        tensors = [self._state[place] for place in self._places]
        for place in self._places:
            self._state[place] = None
        return tensors

    def number(self) -> int:
        """Record it; where it is found in the list of backwards."""
        # Imported here because they import, in the end, this module.
        from bridge.lowering import missing
        from bridge.trace import trace

        gradients = [form for place in self._through if (form := self._outputs[place]) is not None]
        try:
            traced = trace(self._run, [form.empty() for form in (*self._saved, *gradients)])
        except Exception as error:
            raise _unsupported(self._function, f"its backward cannot be recorded ({error})") from error
        if without := missing(traced):
            raise _unsupported(
                self._function, f"its backward has no lowering to JAX for {', '.join(map(str, without))}"
            )
        if traced.draws:
            raise _unsupported(self._function, "its backward draws random numbers")
        key = (traced.text, str(self._saved), str(gradients))
        if key not in _NUMBERS:
            _BACKWARDS.append(traced)
            _NUMBERS[key] = len(_BACKWARDS) - 1
        return _NUMBERS[key]

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        state = list(self._state)
        for place, tensor in zip(self._places, tensors, strict=False):
            state[place] = tensor
        context = copy.copy(self._context)
        vars(context).clear()
        vars(context).update(pytree.tree_unflatten(state, self._structure))
        given = dict(zip(self._through, tensors[len(self._places) :], strict=True))
        gradients = [
            given[place] if place in given else None if form is None else torch.zeros(form.shape, dtype=form.dtype)
            for place, form in enumerate(self._outputs)
        ]
        results = self._function.backward(context, *gradients)
        results = results if isinstance(results, tuple) else (results,)
        return [_as_gradient(results[place], form) for place, form in zip(self._wanted, self._inputs, strict=True)]


def _as_gradient(gradient: Tensor | None, form: _Form) -> Tensor:
    """A gradient of the input's shape and dtype, made from what `backward` returns as PyTorch does."""
    if gradient is None:
        return torch.zeros(form.shape, dtype=form.dtype)
    summed = gradient if tuple(gradient.shape) == form.shape else gradient.sum_to_size(form.shape)
    return summed.to(form.dtype)


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _unsupported(function: type[torch.autograd.Function], why: str) -> Unsupported:
    return Unsupported(
        f"the autograd function {function.__qualname__}: {why}",
        fix="Write it with torch operations whose gradients PyTorch knows, or use backend='torch'.",
    )


@lowers(own_gradient)
def lower_own_gradient(
    operation: Operation,
    outputs: list[jax.Array],
    inputs: list[jax.Array],
    saved: list[jax.Array],
    number: int,
) -> list[jax.Array]:
    """The outputs as they are; backward runs the recorded backward."""
    from bridge.lowering import run

    traced = _BACKWARDS[number]

    @jax.custom_vjp
    def link(outputs: list[jax.Array], inputs: list[jax.Array], saved: list[jax.Array]) -> list[jax.Array]:
        return outputs

    def forward(outputs: list[jax.Array], inputs: list[jax.Array], saved: list[jax.Array]) -> Any:
        return outputs, saved

    def backward(saved: list[jax.Array], gradients: list[jax.Array]) -> Any:
        # The two libraries write complex gradients down as each other's conjugates.
        given = [jnp.conj(gradient) for gradient in gradients]
        with jax.ensure_compile_time_eval():
            constants = {name: to_jax(tensor) for name, tensor in traced.constants.items()}
        results = run(traced, [*saved, *given], constants=constants, convolution=operation.convolution)
        return None, [jnp.conj(result) for result in results], None

    link.defvjp(forward, backward)
    return link(list(outputs), list(inputs), list(saved))
