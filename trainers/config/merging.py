"""Merging of configurations: dicts deep, lists and values replaced, later wins."""

from __future__ import annotations

from typing import Any

from trainers.config.keys import drop_spellings


def merged(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return a base in which an override has replaced what both set, under whatever spellings.

    Args:
        base: Not changed.
        override: Not changed.

    Returns:
        A new dict; what was not merged is shared with the arguments.

    Example:
        >>> merged({"model": {"name": "mlp", "dropout": 0.1}}, {"model": {"type": "cnn"}})
        {'model': {'dropout': 0.1, 'type': 'cnn'}}
    """
    result = dict(base)
    for name, value in override.items():
        below = result.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            below = dict(below)
            drop_spellings(name, below, value)
            result[name] = _deep(below, value)
        else:
            result[name] = value
    return result


def _deep(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in override.items():
        below = result.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            result[name] = _deep(below, value)
        else:
            result[name] = value
    return result
