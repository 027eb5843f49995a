"""Whether the smallest or the largest value of a metric is the best."""

from __future__ import annotations

from trainers.config.errors import ConfigurationError, problem


def sign_of(mode: str) -> int:
    """Return by what values are multiplied for the smallest to be the best.

    Args:
        mode: ``"min"`` or ``"max"``.

    Raises:
        ConfigurationError: There is no such mode.

    Example:
        >>> sign_of("min"), sign_of("max")
        (1, -1)
    """
    if mode not in ("min", "max"):
        raise ConfigurationError(problem("mode", mode, "'min' or 'max'"))
    return 1 if mode == "min" else -1
