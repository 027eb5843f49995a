"""The grid of hyper-parameters: which learning rate and weight decay each model gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Wide enough that the corners are visibly bad: too slow at one end, unstable or crushed at the other.
LEARNING_RATES = (10**-4.5, 0.1)
WEIGHT_DECAYS = (1e-3, 10**0.5)


@dataclass(frozen=True)
class Grid:
    """Every learning rate with every weight decay; weight decays vary fastest.

    Attributes:
        learning_rates: Rising, evenly spaced on a log scale.
        weight_decays: Likewise.
    """

    learning_rates: list[float]
    weight_decays: list[float]

    @property
    def num_models(self) -> int:
        """How many points the grid has."""
        return len(self.learning_rates) * len(self.weight_decays)

    @property
    def configs(self) -> list[dict[str, float]]:
        """Options of ``torch.optim.AdamW``, one dict per model."""
        return [{"lr": lr, "weight_decay": decay} for lr in self.learning_rates for decay in self.weight_decays]


def make_grid(num_models: int) -> Grid:
    """Return a grid of `num_models` points, or of a few less where they would not make a near-square one.

    At least as many learning rates as weight decays, and at most twice as many.

    Example:
        >>> [len(axis) for axis in (make_grid(64).learning_rates, make_grid(64).weight_decays)]
        [8, 8]
        >>> make_grid(32).num_models, make_grid(50).num_models, make_grid(53).num_models
        (32, 50, 49)
    """
    side = math.isqrt(num_models)
    exact = [decays for decays in range(1, side + 1) if num_models % decays == 0 and num_models <= 2 * decays**2]
    num_decays = exact[-1] if exact else side
    return Grid(log_spaced(LEARNING_RATES, num_models // num_decays), log_spaced(WEIGHT_DECAYS, num_decays))


def log_spaced(ends: tuple[float, float], count: int) -> list[float]:
    """Return `count` values from the first end to the second; a single one lies in the middle.

    Example:
        >>> log_spaced((0.01, 1.0), 3)
        [0.01, 0.1, 1.0]
    """
    low, high = (math.log10(end) for end in ends)
    positions = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    # Rounded, so that tables, files and both ways of training hold the same short numbers.
    return [float(f"{10 ** (low + position * (high - low)):.4g}") for position in positions]
