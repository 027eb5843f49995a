"""Gradient clipping per model: each model's gradient is measured and scaled by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_norms(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm of each model's gradient over all its parameters.

    Args:
        grads: Stacked gradients, each ``[num_models, ...]``.
        norm_type: Order of the norm; ``inf`` is the largest absolute value.

    Returns:
        ``[num_models]``.

    Example:
        >>> gradient_norms([torch.tensor([[3.0, 4.0], [0.0, 1.0]])])
        tensor([5., 1.])
    """
    norms = [torch.linalg.vector_norm(grad.reshape(grad.shape[0], -1), norm_type, dim=1) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type, dim=0)


def scale_rows_(grads: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each model's share of every gradient by its factor ``[num_models]``, in place."""
    for grad in grads:
        grad.mul_(rows(factors, grad))


def clip_gradients_(grads: Sequence[Tensor], max_norm: float | Tensor, norm_type: float = 2.0) -> Tensor:
    """Scale, in place, the gradient of each model whose norm exceeds ``max_norm``.

    The factor is ``max_norm / (norm + 1e-6)``, at most 1, as in ``torch.nn.utils.clip_grad_norm_``.

    Args:
        grads: Stacked gradients, each ``[num_models, ...]``.
        max_norm: One bound, or one for each model ``[num_models]``.
        norm_type: Order of the norm.

    Returns:
        The norms before clipping, ``[num_models]``.
    """
    norms = gradient_norms(grads, norm_type)
    bound = max_norm.to(norms) if isinstance(max_norm, Tensor) else max_norm
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)
    if isinstance(bound, Tensor):
        # An infinite bound leaves a model alone, whose norm may be infinite too.
        factors = torch.where(bound.isinf(), 1.0, factors)
    scale_rows_(grads, factors)
    return norms


def separate(grads: Sequence[Tensor]) -> list[Tensor]:
    """Copy the gradients that cannot be changed in place one by one, and keep the others.

    Autograd gives both addends of a sum the same tensor, and every element of a summed tensor the same number.
    """
    seen: set[int] = set()
    own = []
    for grad in grads:
        storage = grad.untyped_storage().data_ptr()
        overlaps = any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))
        own.append(grad.clone(memory_format=torch.contiguous_format) if overlaps or storage in seen else grad)
        seen.add(storage)
    return own


def rows(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value per model ``[num_models]`` to broadcast over ``like`` ``[num_models, ...]``.

    Numbers get the dtype of ``like``; a bool mask stays one.
    """
    dtype = torch.bool if values.dtype == torch.bool else like.dtype
    return values.to(device=like.device, dtype=dtype).view(-1, *[1] * (like.dim() - 1))
