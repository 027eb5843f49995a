"""Per-model configurations: a dict of keyword arguments per model, and errors that name model and keyword."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mb_torch.errors import InvalidInput, ModelBatchError

T = TypeVar("T")


def check_configs(configs: Sequence[Mapping[str, Any]], count: int, what: str = "configs") -> list[dict[str, Any]]:
    """Return copies of the configurations, after checking that there is one per model.

    Args:
        configs: One mapping of keyword arguments per model.
        count: How many models there are.
        what: What the error calls the configurations.

    Raises:
        InvalidInput: Wrong number, or an entry is no mapping of names.

    Example:
        >>> check_configs([{"lr": 0.1}, {"lr": 0.2}], 2)
        [{'lr': 0.1}, {'lr': 0.2}]
    """
    if isinstance(configs, (str, Mapping)) or not isinstance(configs, Sequence):
        raise InvalidInput(what, received=type(configs).__name__, expected=f"a list of {count} dicts")
    if len(configs) != count:
        raise InvalidInput(what, received=f"{len(configs)} configurations", expected=f"{count}, one for each model")
    for model, config in enumerate(configs):
        if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
            raise InvalidInput(f"model {model}: {what}[{model}]", received=config, expected="a dict of keywords")
    return [dict(config) for config in configs]


def call_with_config(
    where: str, function: Callable[..., T], arguments: tuple[Any, ...], config: Mapping[str, Any]
) -> T:
    """Return ``function(*arguments, **config)``; if that fails, say which keyword of which model is to blame.

    Args:
        where: Whose configuration it is, such as ``"model 3"``.
        function: A class or function.
        arguments: Positional arguments; not part of the configuration.
        config: Keyword arguments.

    Raises:
        InvalidInput: The call failed.

    Example:
        >>> call_with_config("model 3", int, ("11",), {"base": 2})
        3
    """
    try:
        return function(*arguments, **config)
    except ModelBatchError:
        raise
    except Exception as error:
        raise _explained(where, function, arguments, config, error) from error


def _explained(
    where: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    config: Mapping[str, Any],
    error: Exception,
) -> InvalidInput:
    name = getattr(function, "__name__", repr(function))
    accepted = _accepted_keywords(function, len(arguments))
    unknown = [key for key in config if accepted is not None and key not in accepted]
    if accepted is not None and unknown:
        close = difflib.get_close_matches(unknown[0], accepted, n=1, cutoff=0.5)
        return InvalidInput(
            f"{where}: {name} has no option {unknown[0]!r}",
            received=dict(config),
            expected=f"options among {', '.join(accepted)}",
            fix=f"Did you mean {close[0]!r}?" if close else None,
        )
    blamed = [key for key, value in config.items() if _fails_alike(function, arguments, {key: value}, error)]
    culprit = f" because of {', '.join(map(repr, blamed))}" if blamed else ""
    return InvalidInput(
        f"{where}: {name} refuses its configuration{culprit}",
        received=dict(config),
        fix=f"It says: {type(error).__name__}: {error}",
    )


def _accepted_keywords(function: Callable[..., Any], positional: int) -> list[str] | None:
    """Names that may be given by keyword; None if anything may, or if that is unknown."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[positional:]
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _fails_alike(
    function: Callable[..., Any], arguments: tuple[Any, ...], config: Mapping[str, Any], error: Exception
) -> bool:
    """Whether one keyword alone gives the same error."""
    try:
        function(*arguments, **config)
    except Exception as other:
        return str(other) == str(error)
    return False
