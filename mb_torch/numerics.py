"""How precisely float32 products are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from mb_torch.errors import InvalidInput

# What torch calls it, and whether cuDNN's convolutions may use TensorFloat-32.
_POLICIES = {"accuracy": ("highest", False), "performance": ("medium", True)}


@contextmanager
def numerics(policy: Literal["accuracy", "performance"]) -> Iterator[None]:
    """Say how precisely matrix products and convolutions in float32 are computed within the block.

    It holds for whatever runs within the block, on all backends and devices: forward passes, backward passes, training
    steps. A compiled step is compiled for each policy. Parameters, sums, losses and optimizer states are float32 under
    both policies; for other types see ``torch.autocast``.

    Without a block PyTorch's own settings hold (``torch.set_float32_matmul_precision``, by default float32; cuDNN's
    convolutions TensorFloat-32), and the XLA backend follows the first of them. On a TPU that is several times slower
    than JAX's own default, and what PyTorch computes.

    Args:
        policy: ``"accuracy"`` computes in float32. ``"performance"`` lets the inputs of products be rounded to
            TensorFloat-32 (10 bits of mantissa) or bfloat16 (7 bits) where the device is faster with these: on recent
            NVIDIA GPUs, on TPUs, on CPUs with instructions for bfloat16. Elsewhere it changes nothing.

    Raises:
        InvalidInput: There is no such policy.

    Example:
        >>> from torch import nn
        >>> from mb_torch import ModelBatch, numerics
        >>> mb = ModelBatch([nn.Linear(4, 2) for _ in range(3)])
        >>> with numerics("performance"):
        ...     outputs = mb(torch.randn(8, 4))
        >>> torch.get_float32_matmul_precision()
        'highest'
    """
    if policy not in _POLICIES:
        raise InvalidInput("numerics", received=repr(policy), expected=f"one of {[*_POLICIES]}")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _apply(*_POLICIES[policy])
    try:
        yield
    finally:
        _apply(*before)


def _apply(products: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
