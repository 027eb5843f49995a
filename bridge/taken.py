"""Tensors that a function takes from elsewhere than its arguments: a recording is made for their values."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bridge.in_place import changed_arguments
from bridge.translation import TensorFunction
from mb_torch.errors import Unsupported


def taken_by(function: TensorFunction, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a function as it is, in PyTorch, and return what it took from elsewhere.

    The function's errors are raised as they are: tensors without values raise less, because they mix dtypes and no
    index of theirs is out of range.

    Raises:
        Unsupported: It draws random numbers of Python's or NumPy's global generators, or writes to a tensor that it
            took from elsewhere: a recording would do both only once. They are put back as they were.

    Example:
        >>> factor = torch.tensor(2.0)
        >>> taken_by(lambda inputs: [inputs[0] * factor], [torch.ones(3)])[0] is factor
        True
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        # Copies: the function may change its inputs in place.
        given = [leaf.clone() for leaf in leaves]
        of_python, of_numpy = random.getstate(), np.random.get_state()
        with _Foreign(given) as foreign:
            function(given)
    if random.getstate() != of_python or not _equal(np.random.get_state(), of_numpy):
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        raise draws_refused("Python's random or of numpy.random")
    foreign.refuse_changes()
    return foreign.tensors


def draws_refused(source: str) -> Unsupported:
    """Return the error for numbers that a function draws from elsewhere than PyTorch."""
    return Unsupported(
        f"random numbers of {source} are drawn, which a compiled program does only once",
        fix="Draw with PyTorch (torch.rand and torch.where on it), or use backend='torch'.",
    )


def _equal(state: Any, other: Any) -> bool:
    return all(np.array_equal(one, two) for one, two in zip(state, other, strict=True))


class _Foreign(TorchFunctionMode):
    """Collects the tensors that torch functions get and that neither are inputs nor came out of such functions."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._before: dict[int, Tensor] = {}
        # By identity; holding the tensors keeps identities their own.
        self._seen = {id(tensor): tensor for tensor in inputs}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) not in self._seen:
                self.tensors.append(leaf)
                self._versions.append(0 if leaf.is_inference() else leaf._version)
                self._seen[id(leaf)] = leaf
        for changed in changed_arguments(func, args, kwargs):
            if any(changed is own for own in self.tensors) and id(changed) not in self._before:
                self._before[id(changed)] = changed.detach().clone()
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._seen[id(leaf)] = leaf
        return result

    def refuse_changes(self) -> None:
        """Raise `Unsupported` if one of the tensors was changed; it is put back."""
        pairs = zip(self.tensors, self._versions, strict=True)
        changed = [one for one, version in pairs if not one.is_inference() and one._version != version]
        if not changed:
            return
        with torch.no_grad():
            for one in changed:
                if id(one) in self._before:
                    one.copy_(self._before[id(one)])
        shapes = ", ".join(f"{one.dtype} of shape {tuple(one.shape)}" for one in changed)
        raise Unsupported(
            f"a tensor from outside is written to ({shapes}), which a compiled program does only once",
            fix="Register it as a buffer of the model, or use backend='torch'.",
        )


def is_written_by_torch_only(tensor: Tensor) -> bool:
    """Whether every change of a tensor's values shows in its version.

    What NumPy or another process shares the memory of, it changes unseen, and inference tensors have no version.
    ``tensor.data`` is the way around versions that is left, as it is for autograd.

    Example:
        >>> import numpy as np
        >>> is_written_by_torch_only(torch.ones(3)), is_written_by_torch_only(torch.from_numpy(np.ones(3)))
        (True, False)
    """
    if tensor.is_inference() or tensor.is_shared():
        return False
    # Storage whose memory something else knows cannot be resized.
    return tensor.device.type != "cpu" or tensor.untyped_storage().resizable()


class Taken:
    """A tensor and what it was when a recording was made for it.

    Example:
        >>> factor = torch.tensor(2.0)
        >>> taken = Taken(factor)
        >>> _ = factor.add_(1)
        >>> taken.is_current()
        False
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version
        self._values = None if is_written_by_torch_only(tensor) else _bytes(tensor)

    def is_current(self) -> bool:
        """Whether the tensor has the same values, as far as its version says or they had to be kept."""
        tensor = self._tensor
        if self._version is not None and tensor._version != self._version:
            return False
        if is_written_by_torch_only(tensor):
            return True
        return self._values == _bytes(tensor)


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()
