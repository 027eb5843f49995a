"""`modelbatch.data`: which model sees which rows."""

from __future__ import annotations

from mb_torch import DataRouter, StratifiedDataRouter, StratifiedRouter, create_random_masks

__all__ = ["DataRouter", "StratifiedDataRouter", "StratifiedRouter", "create_random_masks"]
