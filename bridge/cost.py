"""What a function costs, read off its operations before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr

from bridge.probe import inside


def bytes_written(function: Callable[..., Any], *examples: Any) -> int:
    """Return how many bytes all values take that a function computes, each operation's result by itself.

    A compiler merges operations, so this is more than what it writes to memory; it tells functions apart whose values
    fit into a cache from those whose values do not. The body of a loop counts once.

    Args:
        function: A function of arrays.
        examples: Its arguments: arrays, or anything with a shape and a dtype.

    Example:
        >>> bytes_written(lambda x: jax.numpy.sin(x) + 1, jax.ShapeDtypeStruct((8,), "float32"))
        64
    """
    return _bytes_written(jax.make_jaxpr(function)(*examples).jaxpr)


def _bytes_written(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        bodies = list(inside(equation))
        total += sum(map(_bytes_written, bodies)) if bodies else sum(map(_bytes, equation.outvars))
    return total


def _bytes(variable: Any) -> int:
    # Random keys have a dtype of their own, and are small.
    itemsize = getattr(variable.aval.dtype, "itemsize", 0)
    return math.prod(variable.aval.shape) * itemsize
