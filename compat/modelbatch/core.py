"""`modelbatch.core`: the batch of models."""

from __future__ import annotations

from mb_torch import ModelBatch

__all__ = ["ModelBatch"]
