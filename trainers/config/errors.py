"""Errors of the configuration; each says what was received, what was expected and what to do, by dotted key."""

from __future__ import annotations

from collections.abc import Iterable

# Longer values are cut in messages: a whole data set written into a field would hide the key that is wrong.
_LONGEST_SHOWN = 120


class ConfigurationError(Exception):
    """Base of all errors about configurations.

    Example:
        >>> raise ConfigurationError("model.hiden_size is no key of the schema")
        Traceback (most recent call last):
        ...
        trainers.config.errors.ConfigurationError: model.hiden_size is no key of the schema
    """


class ValidationError(ConfigurationError, ValueError):
    """A configuration has invalid content; everything wrong with it is listed at once.

    Args:
        problems: One text a problem, each beginning with the dotted key.
        source: Where the configuration came from, such as a file; None for a dict.

    Attributes:
        problems: As given, as a list.
        source: As given.

    Example:
        >>> error = ValidationError(["training.epochs: received 0; expected more than 0"])
        >>> error.problems
        ['training.epochs: received 0; expected more than 0']
    """

    def __init__(self, problems: str | Iterable[str], source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        where = "the configuration" if source is None else source
        super().__init__("\n  - ".join([f"{count} in {where}:", *self.problems]))

    def __reduce__(self) -> tuple[type[ValidationError], tuple[list[str], str | None]]:
        # The printed text is not what the constructor takes; worker processes send errors by pickle.
        return type(self), (self.problems, self.source)


class MissingConfiguration(ConfigurationError, FileNotFoundError):
    """No configuration file is where it was looked for; the message lists the places."""


class UnsupportedFormat(ConfigurationError, ValueError):
    """A suffix or format that is neither YAML nor JSON."""


def problem(key: str, received: object, expected: str, fix: str | None = None) -> str:
    """Return the text of one problem.

    Args:
        key: Dotted key.
        received: The offending value.
        expected: What would have been accepted.
        fix: What to do about it, as a sentence.

    Returns:
        One text that begins with the key.

    Example:
        >>> problem("training.epochs", 0, "more than 0")
        'training.epochs: received 0; expected more than 0'
    """
    shown = repr(received)
    if len(shown) > _LONGEST_SHOWN:
        shown = f"{shown[:_LONGEST_SHOWN]}..."
    return f"{key}: received {shown}; expected {expected}" + ("" if fix is None else f". {fix}")
