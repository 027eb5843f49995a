"""Asks torch.func which transformations are in force, and runs operations beneath vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter


def under_vmap() -> bool:
    """Whether a torch.func transformation is active, so that tensors may stand for all models.

    Example:
        >>> under_vmap()
        False
        >>> seen = []
        >>> _ = torch.vmap(lambda x: (seen.append(under_vmap()), x)[1])(torch.ones(2))
        >>> seen
        [True]
    """
    return _functorch.peek_interpreter_stack() is not None


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a gradient flows to a tensor from any level; a batched tensor itself says that none does."""
    while not tensor.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def mapped_models() -> int | None:
    """How many models the one vmap in force runs; None if other transformations are in force as well, or none.

    Example:
        >>> seen = []
        >>> _ = torch.vmap(lambda x: (seen.append(mapped_models()), x)[1])(torch.ones(5))
        >>> seen, mapped_models()
        ([5], None)
    """
    if not under_vmap():
        return None
    interpreter = retrieve_current_functorch_interpreter()
    return interpreter.batch_size() if isinstance(interpreter, VmapInterpreter) and interpreter.level() == 1 else None


def each_alone(operation: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run an operation that vmap cannot batch for one model after another, where `mapped_models` gives a number.

    Args:
        operation: Takes the tensors of one model and returns tensors.
        tensors: What it takes.

    Returns:
        What it returns, as tensors that stand for all models again.
    """
    interpreter = retrieve_current_functorch_interpreter()
    assert isinstance(interpreter, VmapInterpreter)
    level = interpreter.level()
    with interpreter.lower():
        pairs = [_functorch._unwrap_batched(tensor, level) for tensor in tensors]
        columns = [
            [tensor] * interpreter.batch_size() if axis is None else tensor.unbind(axis) for tensor, axis in pairs
        ]
        results = [operation(*own) for own in zip(*columns, strict=True)]
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        return tuple(_functorch._add_batch_dim(stack, 0, level) for stack in stacked)
