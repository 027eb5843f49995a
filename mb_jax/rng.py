"""Random keys of models: a function of the model's seed and step, whoever its companions are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch

from bridge.arrays import to_jax
from mb_torch.random_streams import RandomStreams

Random = tuple[jax.Array, jax.Array]
"""Seeds and steps of all models, each ``[num_models]`` int64."""


def key_of(seed: jax.Array, step: jax.Array) -> jax.Array:
    """The random key of one model at one step.

    Args:
        seed: Any 64-bit integer.
        step: How often the model has drawn before.
    """
    return jax.random.fold_in(jax.random.key(seed), step.astype(jnp.uint32))


def random_state(streams: RandomStreams | None, num_models: int) -> Random:
    """Seeds and steps of all models; without streams from torch's global generator, which moves on."""
    if streams is not None:
        return to_jax(streams.seeds), to_jax(streams.steps)
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_models,), dtype=torch.int64)
    return to_jax(seeds), to_jax(torch.zeros(num_models, dtype=torch.int64))
