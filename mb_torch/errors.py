"""The one error family of the library.

Every error says what happened with the values received, what was expected, and what to do about it. Each class
also derives from the built-in exception that plain PyTorch code would catch in its place.
"""

from __future__ import annotations


class ModelBatchError(Exception):
    """Base of every error raised by this library.

    Args:
        problem: What went wrong, naming the model, submodule or key concerned.
        received: The offending value, as the user would recognise it.
        expected: What would have been accepted.
        fix: What to do about it; on a line of its own where the problem takes several.

    Attributes:
        problem: What went wrong, with what was received and expected.
        fix: As given.

    Example:
        >>> str(ModelBatchError("model 3: bad lr", received=-1, expected="lr >= 0", fix="Use a positive rate."))
        'model 3: bad lr: received -1; expected lr >= 0. Use a positive rate.'
    """

    def __init__(
        self, problem: str, *, received: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        details = []
        if received is not None:
            details.append(f"received {received}")
        if expected is not None:
            details.append(f"expected {expected}")
        self.problem = problem + (": " + "; ".join(details) if details else "")
        self.fix = fix
        end = "\n" if "\n" in problem else ". "
        super().__init__(self.problem if fix is None else f"{self.problem.rstrip('.')}{end}{fix}")


class IncompatibleModels(ModelBatchError, ValueError):
    """The models cannot share one batch: their structure, tensors or settings differ."""


class InvalidInput(ModelBatchError, ValueError):
    """An argument has the wrong type, shape, length, range or name."""


class InvalidState(ModelBatchError, ValueError):
    """A state to be loaded does not fit; what was there before is unchanged."""


class MissingState(InvalidState, FileNotFoundError):
    """A state file that should be loaded does not exist."""


class Unsupported(ModelBatchError, RuntimeError):
    """The backend cannot do this; raised at the first use, never worked around silently."""


class MissingPackage(Unsupported, ImportError):
    """A package that the backend needs is not installed."""
