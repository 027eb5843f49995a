"""What a position outside of an array gives.

PyTorch raises, which a compiled program cannot. So the result is loudly wrong: NaN, of integers the smallest there is
(of unsigned ones the largest). What should be written outside is that, too, in the nearest place; and so is everything
that is written together with it, because of what is written twice in one place only one remains. Booleans have no such
value: they are true where they are read outside, and are written in the nearest place as they are.
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


def is_inside(index: Array, size: int, *, from_end: bool = False) -> Array:
    """Where positions exist; with ``from_end`` negative ones may count from the end."""
    return (index >= (-size if from_end else 0)) & (index < size)


def or_alarm(source: Array, inside: Array) -> Array:
    """What is written somewhere, or the alarm in its place; booleans stay."""
    return source if source.dtype == jnp.bool_ else jnp.where(inside, source, alarm(source.dtype))


__all__ = ["alarm", "from_start", "is_inside", "or_alarm", "read", "read_along"]
