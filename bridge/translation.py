"""What every translator returns: a torch function as a pure JAX function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import torch
from torch import Tensor, nn

TensorFunction = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Takes and returns flat sequences of tensors."""


@dataclass(frozen=True)
class Translation:
    """A torch function of a flat sequence of tensors, as a pure JAX function.

    Attributes:
        translator: Which translator made it.
        run: ``run(arrays, key, convolution)`` -> one array per output; ``key`` is a random key.
        dtypes: The dtype of each output, as PyTorch has it.
        draws: Whether it draws random numbers.
        unchanged: For each output, the position of the input that it is a copy of, or None.
        reached: For each output, the positions of the inputs that gradients flow to from it.
        text: A digest of what is computed; equal ones compute the same from inputs of equal shapes and dtypes.
            Empty where there is none.
        known: Positions of the inputs whose values it was made for, and no others; None if values could not be looked
            at. See `bridge.known`.
    """

    translator: str
    run: Callable[[Sequence[jax.Array], jax.Array | None, str], list[jax.Array]]
    dtypes: tuple[torch.dtype, ...]
    draws: bool
    unchanged: tuple[int | None, ...]
    reached: tuple[frozenset[int], ...]
    text: str
    known: tuple[int, ...] | None = None


class Translator(Protocol):
    """Turns torch functions into JAX functions."""

    name: str

    def translate(
        self, function: TensorFunction, inputs: Sequence[Tensor], modules: Sequence[nn.Module]
    ) -> Translation:
        """Translate a function for inputs of these shapes, dtypes and ``requires_grad``.

        Raises:
            Unsupported: It cannot; the error lists what is missing.
        """
