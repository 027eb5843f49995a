"""Model i's own parameters as views into the stacks.

A stack is one parameter of all models, ``[num_models, ...]``. Its `ModelView` is a leaf that shares the
storage of ``stack[i]`` and whose ``.grad`` is ``stack.grad[i]``, so that whatever is written for the
parameters of one plain model (clipping, a gradient scaler, any optimizer) works on one model of a batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mb_torch.errors import InvalidInput


class Stack:
    """A stacked parameter and the models whose gradients were set to None one by one.

    A stack's gradient exists for all models or for none. A model's gradient that is set to None becomes a row
    of zeros that is marked here; the mark is gone as soon as anything is added to the row or the stack gets a
    new gradient.

    Args:
        name: The parameter's name in a model.
        parameter: ``[num_models, ...]``.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self._cleared: set[int] = set()
        self._cleared_in: Tensor | None = None

    @property
    def num_models(self) -> int:
        """How many models the stack holds."""
        return self.parameter.shape[0]

    def view(self, model: int) -> ModelView:
        """Return model i's part as a leaf of its own."""
        return ModelView(self, model)

    @property
    def has_cleared(self) -> bool:
        """Whether single models' gradients were set to None since the stack's were."""
        return bool(self._cleared)

    def cleared(self) -> frozenset[int]:
        """Models that have no gradient although the stack has one."""
        grad = self.parameter.grad
        if self._cleared and grad is not self._cleared_in:
            self._cleared = set()
        self._cleared_in = grad if self._cleared else None
        if self._cleared and grad is not None:
            self._cleared = {model for model in self._cleared if not bool(grad[model].any())}
        return frozenset(self._cleared)

    def grad_of(self, model: int) -> Tensor | None:
        """Model i's gradient, a view into the stack's; None if there is none."""
        grad = self.parameter.grad
        if grad is None or (self._cleared and model in self.cleared()):
            return None
        return grad[model]

    def set_grad(self, model: int, value: Tensor | None) -> None:
        """Replace model i's gradient; those of the other models stay as they are."""
        cleared = set(self.cleared())
        grad = self.parameter.grad
        if value is None:
            if grad is None:
                return
            cleared.add(model)
            with torch.no_grad():
                grad[model].zero_()
        else:
            if value.shape != self.parameter.shape[1:]:
                raise InvalidInput(
                    f"model {model}: gradient of {self.name!r}",
                    received=f"shape {list(value.shape)}",
                    expected=f"shape {list(self.parameter.shape[1:])}",
                )
            if grad is None:
                grad = torch.zeros_like(self.parameter)
                self.parameter.grad = grad
                cleared = set(range(self.num_models))
            cleared.discard(model)
            with torch.no_grad():
                grad[model].copy_(value)
        if len(cleared) == self.num_models:
            self.zero_grad()
        else:
            self._cleared, self._cleared_in = cleared, grad if cleared else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all models."""
        self._cleared, self._cleared_in = set(), None
        if set_to_none:
            self.parameter.grad = None
        elif self.parameter.grad is not None:
            with torch.no_grad():
                self.parameter.grad.detach_().zero_()


# Where autograd itself keeps the gradient of a leaf.
_AUTOGRAD_GRAD: Any = torch.Tensor.grad


class ModelView(nn.Parameter):
    """One model's part of a stack as a leaf parameter of its own.

    Its ``grad`` is a view into the stack's gradient. Gradients that autograd accumulates into the view
    itself, from a penalty on one model's parameters say, are added there too.

    Args:
        stack: The stacked parameter.
        model: Which model.
    """

    _stack: Stack
    _model: int

    def __new__(cls, stack: Stack, model: int) -> ModelView:
        """Share the storage of ``stack[model]``."""
        view: ModelView = torch.Tensor._make_subclass(cls, stack.parameter.detach()[model], True)
        view._stack, view._model = stack, model
        view.register_post_accumulate_grad_hook(_pass_to_stack)
        return view

    @property
    def grad(self) -> Tensor | None:
        """Model i's row of the stack's gradient."""
        return self._stack.grad_of(self._model)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._stack.set_grad(self._model, value)

    def refresh(self) -> None:
        """Follow the stack to where its storage is now."""
        self.data = self._stack.parameter.detach()[self._model]

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelView:
        if id(self) not in memo:
            memo[id(self)] = ModelView(copy.deepcopy(self._stack, memo), self._model)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return ModelView, (self._stack, self._model)


def _pass_to_stack(view: Tensor) -> None:
    """Move a gradient that autograd left in a view itself into its stack."""
    assert isinstance(view, ModelView)
    own = _AUTOGRAD_GRAD.__get__(view)
    if own is not None:
        _AUTOGRAD_GRAD.__set__(view, None)
        present = view.grad
        view.grad = own if present is None else present + own
