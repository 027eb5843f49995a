"""Operations that a translator is known to get wrong, so that they are refused early and with a reason.

What is not listed here is still compared with PyTorch before it is used; see `bridge.verify`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Arguments = Mapping[str, Any]
"""The arguments of one call, by name and with defaults."""


class Denied(NamedTuple):
    """Calls of one operation that come out wrong.

    Attributes:
        applies: Whether a call with these arguments does.
        reason: What is wrong and what helps.
    """

    applies: Callable[[Arguments], bool]
    reason: str


def _updates_statistics(arguments: Arguments) -> bool:
    training = arguments.get("training", arguments.get("use_input_stats"))
    return bool(training) and arguments["running_mean"] is not None


_NO_STATISTICS = Denied(
    _updates_statistics,
    "{name} in training would leave its running statistics unchanged; call .eval() or set track_running_stats=False",
)

DENIED: dict[str, dict[Callable[..., Any], Denied]] = {
    "torchax": {
        F.batch_norm: _NO_STATISTICS,
        F.instance_norm: _NO_STATISTICS,
        F.embedding: Denied(
            lambda arguments: bool(arguments["scale_grad_by_freq"]),
            "{name} would ignore scale_grad_by_freq; train it without",
        ),
    },
    "torch2jax": {
        F.gelu: Denied(
            lambda arguments: arguments.get("approximate", "none") == "none",
            "{name} would be its tanh approximation; use approximate='tanh' if that is meant",
        ),
        # The comparison shows this only where its inputs take the other branch.
        torch.Tensor.__bool__: Denied(lambda _: True, "every tensor would count as true in a Python condition"),
    },
}
"""By translator and torch function."""


def denial(translator: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call must not be left to a translator, or None.

    Example:
        >>> denial("torch2jax", F.gelu, (), {})
        "gelu would be its tanh approximation; use approximate='tanh' if that is meant"
        >>> denial("torch2jax", F.gelu, (), {"approximate": "tanh"}) is None
        True
    """
    denied = DENIED.get(translator, {}).get(func)
    if denied is None or not denied.applies(_by_name(func, args, kwargs)):
        return None
    return denied.reason.format(name=func.__name__)


def _by_name(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
    except ValueError:  # built in, without a signature: its options are keywords
        return kwargs
    bound.apply_defaults()
    return bound.arguments
