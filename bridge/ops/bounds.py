"""What a position outside of an array gives.

PyTorch raises, which a compiled program cannot. So the result is loudly wrong: NaN, of integers the smallest there is
(of unsigned ones the largest). Booleans have no such value. An element of theirs counts as true where it is read, and
nothing is written outside.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array


def alarm(dtype: jnp.dtype) -> Any:
    """The value of a dtype that no computation should have given."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.nan
    if dtype == jnp.bool_:
        return True
    limits = jnp.iinfo(dtype)
    return limits.min if jnp.issubdtype(dtype, jnp.signedinteger) else limits.max


def from_start(index: Array, size: int) -> Array:
    """The index for functions that count negative ones from the end: here they are outside, as others are."""
    return index if jnp.issubdtype(index.dtype, jnp.unsignedinteger) else jnp.where(index < 0, size, index)


def read(value: Array, places: Any) -> Array:
    """``value[places]``, where negative positions count from the end; the alarm outside."""
    result: Array = value.at[places].get(mode="fill", fill_value=alarm(value.dtype))
    return result


def read_along(value: Array, index: Array, axis: int) -> Array:
    """Single elements along an axis; the alarm outside, negative positions included."""
    index = from_start(index, value.shape[axis])
    return jnp.take_along_axis(value, index, axis=axis, mode="fill", fill_value=alarm(value.dtype))


__all__ = ["alarm", "from_start", "read", "read_along"]
