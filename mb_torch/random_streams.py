"""The backend-neutral random state of a batch: a seed and a step for each model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mb_torch.errors import InvalidInput


class RandomStreams(nn.Module):
    """One random stream per model, identified by (seed, step).

    What a model draws depends on its own seed and step only, so it does not matter which models share its batch.

    Args:
        seeds: One integer per model; equal seeds give equal streams.
        num_models: How many models there are.

    Attributes:
        seeds: ``[num_models]`` int64.
        steps: ``[num_models]`` int64, the number of forward passes in which the model drew random numbers.

    Example:
        >>> RandomStreams([7, 8], 2).steps
        tensor([0, 0])
    """

    seeds: Tensor
    steps: Tensor

    def __init__(self, seeds: Sequence[int] | Tensor, num_models: int) -> None:
        super().__init__()
        self.register_buffer("seeds", _seed_tensor(seeds, num_models))
        self.register_buffer("steps", torch.zeros(num_models, dtype=torch.int64))

    def advance(self, active: Tensor | None = None) -> None:
        """Move every model, or every ``active`` ``[num_models]`` one, to its next step."""
        self.steps += 1 if active is None else active.to(self.steps)

    def select(self, indices: Tensor) -> RandomStreams:
        """Copy the streams of some models, in the order of ``indices`` ``[count]``."""
        chosen = RandomStreams(self.seeds[indices].cpu(), len(indices)).to(self.seeds.device)
        chosen.steps.copy_(self.steps[indices])
        return chosen


def _seed_tensor(seeds: Sequence[int] | Tensor, num_models: int) -> Tensor:
    values = seeds.tolist() if isinstance(seeds, (Tensor, np.ndarray)) else list(seeds)
    if len(values) != num_models:
        raise InvalidInput("seeds", received=f"{len(values)} seeds", expected=f"one for each of {num_models} models")
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise InvalidInput(f"the seed of model {index}", received=repr(value), expected="an integer")
    # Wrapped to 64 bits: any Python integer is a seed.
    wrapped = [(int(value) + 2**63) % 2**64 - 2**63 for value in values]
    return torch.tensor(wrapped, dtype=torch.int64)
