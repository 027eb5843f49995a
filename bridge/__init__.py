"""PyTorch and JAX in one program: arrays, gradients and translated functions. Knows nothing of model batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mb_torch.errors import MissingPackage

if TYPE_CHECKING:
    from bridge.flax_module import TorchModule
    from bridge.public import translate

# Loaded at first use: the rest of the bridge works without flax.
_PLACES = {"TorchModule": "bridge.flax_module", "translate": "bridge.public"}

__all__ = ["TorchModule", "translate"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "bridge":
            raise
        raise MissingPackage(
            f"bridge.{name} needs the package {missing}", fix="Run: pip install 'modelbatch-hybrid[jax]'"
        ) from error
