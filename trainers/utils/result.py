"""A value or an error, as a return value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
E = TypeVar("E")
U = TypeVar("U")


class Result(ABC, Generic[T, E]):
    """What an operation returned: a `Success` with a value or an `Error` with an error. Never changes.

    Example:
        >>> def parse(text: str) -> Result[int, str]:
        ...     return Success(int(text)) if text.isdecimal() else Error(f"{text!r} is no number")
        >>> parse("12").map(lambda number: number + 1)
        Success(13)
        >>> parse("x").unwrap_or(0)
        0
    """

    __slots__ = ("_content",)
    _content: Any

    def __init__(self, content: Any) -> None:
        object.__setattr__(self, "_content", content)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{self!r} cannot be changed; make a new one")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and bool(self._content == other._content)

    def __hash__(self) -> int:
        return hash((type(self), self._content))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._content!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._content,)

    @property
    @abstractmethod
    def value(self) -> T:
        """The value of a `Success`; an `Error` has none and raises AttributeError."""

    @property
    @abstractmethod
    def error(self) -> E:
        """The error of an `Error`; a `Success` has none and raises AttributeError."""

    @property
    def is_success(self) -> bool:
        """Whether there is a value."""
        return isinstance(self, Success)

    @property
    def is_error(self) -> bool:
        """Whether there is an error."""
        return isinstance(self, Error)

    @abstractmethod
    def unwrap(self) -> T:
        """Return the value.

        Raises:
            ValueError: This is an `Error`; an exception in it is the cause.
        """

    def unwrap_or(self, default: T) -> T:
        """Return the value, or the default if there is none."""
        return self.value if self.is_success else default

    def map(self, function: Callable[[T], U]) -> Result[U, E]:
        """Return the result of calling the function with the value; an `Error` stays as it is."""
        return Success(function(self.value)) if self.is_success else Error(self.error)

    def map_error(self, function: Callable[[E], U]) -> Result[T, U]:
        """Return the result of calling the function with the error; a `Success` stays as it is."""
        return Error(function(self.error)) if self.is_error else Success(self.value)


class Success(Result[T, Any]):
    """A result with a value, which may be None.

    Args:
        value: The value.

    Example:
        >>> Success(None).is_success, Success(2).value
        (True, 2)
    """

    __slots__ = ()
    __match_args__ = ("value",)

    def __init__(self, value: T) -> None:
        super().__init__(value)

    @property
    def value(self) -> T:
        """The value."""
        content: T = self._content
        return content

    @property
    def error(self) -> Any:
        """Raises AttributeError."""
        raise AttributeError(f"{self!r} has no error; ask is_error first")

    def unwrap(self) -> T:
        """Return the value."""
        return self.value


class Error(Result[Any, E]):
    """A result with an error.

    Args:
        error: What went wrong: a text, an exception or whatever the operation promises.

    Example:
        >>> Error("disk full").is_error, Error("disk full").error
        (True, 'disk full')
    """

    __slots__ = ()
    __match_args__ = ("error",)

    def __init__(self, error: E) -> None:
        super().__init__(error)

    @property
    def value(self) -> Any:
        """Raises AttributeError."""
        raise AttributeError(f"{self!r} has no value; ask is_success first")

    @property
    def error(self) -> E:
        """The error."""
        content: E = self._content
        return content

    def unwrap(self) -> Any:
        """Raise ValueError.

        Raises:
            ValueError: Always; an exception in this `Error` is the cause.
        """
        cause = self.error if isinstance(self.error, BaseException) else None
        raise ValueError(f"unwrap() needs a Success: received {self!r}") from cause
