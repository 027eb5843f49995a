"""The error that ends the command with one line."""

from __future__ import annotations


class CommandError(Exception):
    """What the person at the terminal can put right; shown without a traceback."""
