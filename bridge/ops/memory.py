"""Where XLA is to compute a value once and keep it, instead of once for each place where it is used."""

from __future__ import annotations

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def in_memory(array: jax.Array) -> jax.Array:
    """The same array, computed before what uses it and only once.

    On CPUs XLA merges whatever leads to a gather or a sum of shifted views into it, and computes it anew for every
    element that is read: an activation and pooling before a 3x3 convolution nine times. A call that is not inlined
    keeps them apart (an optimization barrier is gone by then). Elsewhere nothing is added.
    """
    if jax.default_backend() != "cpu":
        return array
    with set_xla_metadata(inlineable="false"):
        return _identity(array)


@jax.jit
def _identity(array: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(array)
