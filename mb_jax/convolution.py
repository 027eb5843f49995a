"""Which form of convolution suits the platform."""

from __future__ import annotations

import jax

# By measurement (docs/design): the backward pass of XLA's grouped convolutions is up to 20 times slower on a CPU.
_BY_PLATFORM = {"cpu": "matmul"}


def convolution_form(chosen: str, num_models: int) -> str:
    """Return ``"native"`` or ``"matmul"``.

    Args:
        chosen: One of these, or ``"auto"``.
        num_models: How many models a program runs at once; one model has nothing to group.
    """
    if chosen != "auto":
        return chosen
    return _BY_PLATFORM.get(jax.default_backend(), "native") if num_models > 1 else "native"
