"""Torch modules and functions as flax.nnx modules and JAX functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import jax
from torch import Tensor, nn

from bridge.calls import Arguments, Calls, Program, Report
from bridge.flax_module import TorchModule
from mb_torch.errors import InvalidInput


@overload
def translate(
    target: nn.Module,
    *example_inputs: Any,
    translator: str = ...,
    verify: bool = ...,
    **example_kwargs: Any,
) -> TorchModule: ...
@overload
def translate(
    target: Callable[..., Any],
    *example_inputs: Any,
    translator: str = ...,
    verify: bool = ...,
    **example_kwargs: Any,
) -> TranslatedFunction: ...
def translate(
    target: Callable[..., Any],
    *example_inputs: Any,
    translator: str = "auto",
    verify: bool = True,
    **example_kwargs: Any,
) -> TorchModule | TranslatedFunction:
    """Translate a torch module or function to JAX, and compare it with PyTorch.

    Args:
        target: A module, or any function of tensors; loss functions too.
        *example_inputs: Its arguments: tensors, or JAX or NumPy arrays in their place. If any tensor requires
            gradients, only the gradients of these are compared for a function; otherwise those of all floats.
        translator: ``"auto"`` or a name from `bridge.translators.available_translators`.
        verify: Compare outputs, gradients and changed buffers in float64, and refuse what differs by more than 1e-9.
        **example_kwargs: Its keyword arguments.

    Returns:
        For a module a `TorchModule`, else a `TranslatedFunction`. Inputs of other forms than the example are
        translated and compared at their first use.

    Raises:
        InvalidInput: The target cannot be called, or there is no such translator.
        Unsupported: No translator can, or none agrees with PyTorch; lists the reason of each.

    Example:
        >>> import jax.numpy as jnp
        >>> import torch
        >>> loss = translate(nn.functional.cross_entropy, torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
        >>> gradient = jax.jit(jax.grad(loss))(jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0]))
        >>> gradient.shape
        (4, 3)
        >>> translate(nn.Linear(3, 2), torch.randn(8, 3))(jnp.ones((4, 3))).shape
        (4, 2)
    """
    if isinstance(target, nn.Module):
        module = TorchModule(target, translator=translator, verify=verify)
        module.prepare(*example_inputs, **example_kwargs)
        return module
    if not callable(target):
        raise InvalidInput("translate", received=type(target).__name__, expected="a torch.nn.Module or a function")
    marked = Arguments(example_inputs, example_kwargs).require_grad
    calls = Calls(translator=translator, verify=verify, differentiable=marked if any(marked) else None)
    function = TranslatedFunction(target, calls)
    function.prepare(*example_inputs, **example_kwargs)
    return function


class TranslatedFunction:
    """A torch function as a pure function of JAX arrays, for ``jax.jit``, ``jax.grad`` and ``jax.vmap``.

    Made by `translate`. What else the function uses, tensors it has caught included, is as it was at the first use
    with arguments of the same form.

    Args:
        target: The torch function.
        calls: Its programs.

    Example:
        >>> import jax.numpy as jnp
        >>> import torch
        >>> function = translate(lambda x, power: {"y": x**power}, torch.ones(3), 2)
        >>> function(jnp.arange(3.0), 2)
        {'y': Array([0., 1., 4.], dtype=float32)}
    """

    def __init__(self, target: Callable[..., Any], calls: Calls) -> None:
        self._target = target
        self._calls = calls

    def __call__(self, *args: Any, key: jax.Array | None = None, **kwargs: Any) -> Any:
        """Run the function.

        Args:
            *args: Its arguments, with arrays in the places of tensors.
            key: A random key; needed if it draws random numbers.
            **kwargs: Its keyword arguments.

        Returns:
            What the torch function returns, with arrays in the places of tensors.

        Raises:
            InvalidInput: The function draws random numbers and there is no key.
            Unsupported: No translation for arguments of this form.
        """
        arguments = Arguments(args, kwargs)
        program = self._program(arguments)
        if program.draws and key is None:
            raise InvalidInput("the function draws random numbers", received="no key", expected="key=jax.random.key(…)")
        return program.run([], arguments.arrays, key)[0]

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Translate for arguments of this form now instead of at the first call.

        Args:
            *args: As for a call.
            **kwargs: As for a call.

        Example:
            >>> import torch
            >>> function = translate(torch.sin, torch.ones(3))
            >>> function.prepare(torch.ones(4))
            >>> len(function.report())
            2
        """
        self._program(Arguments(args, kwargs))

    def report(self) -> list[Report]:
        """Say which translator serves each form of the arguments so far, and how far from PyTorch it was.

        Example:
            >>> import torch
            >>> translate(torch.sin, torch.ones(3)).report()[0].translator
            'graph'
        """
        return self._calls.reports()

    def _program(self, arguments: Arguments) -> Program:
        def body(state: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
            return self._target(*args, **kwargs), state

        return self._calls.program(None, arguments, lambda: (body, []))
