"""Other spellings of fields, some of which convert the value; everything that is written uses the canonical names."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trainers.config.errors import problem

# Section to other spelling to canonical name.
OTHER_SPELLINGS: dict[str, dict[str, str]] = {
    "model": {"type": "name"},
    "training": {"max_epochs": "epochs", "validation_frequency": "validation_every_n_epochs"},
    "data": {"data_dir": "dataset_path"},
    "optimizer": {"type": "name", "lr": "learning_rate"},
    "scheduler": {"type": "name"},
    "slurm": {"time": "time_limit", "extra_args": "additional_args", "gpus_per_node": "gres"},
    "logging": {"console_log_level": "log_level", "log_scalars_every_n_steps": "log_every_n_steps"},
    "checkpoint": {
        "root_dir": "checkpoint_dir",
        "max_checkpoints": "save_top_k",
        "monitor_metric": "monitor",
        "monitor_mode": "mode",
        "filename_template": "filename",
    },
    "preemption": {
        "max_checkpoint_sec": "timeout_minutes",
        "signal": "signals",
        "resume_from_latest_symlink": "auto_resume",
    },
    "performance": {"dataloader_num_workers": "num_workers", "use_amp": "mixed_precision"},
}


class Conversion(NamedTuple):
    """How a spelling's value becomes that of the canonical field, and back.

    Attributes:
        expected: What the spelling accepts, in words.
        inward: Value to canonical value; raises ValueError for what it does not accept.
        outward: Canonical value to value.
    """

    expected: str
    inward: Callable[[Any], Any]
    outward: Callable[[Any], Any]


def canonical_section(section: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a section under canonical names.

    Args:
        section: Name of the section.
        given: Its content, under any spelling; not changed.

    Returns:
        The content, unknown keys included, and one text for each value that cannot be converted and for each field
        given twice with different values.

    Example:
        >>> canonical_section("slurm", {"gpus_per_node": 2, "time": "2:00:00"})
        ({'gres': 'gpu:2', 'time_limit': '2:00:00'}, [])
    """
    others = OTHER_SPELLINGS.get(section, {})
    content: dict[str, Any] = {}
    found: dict[str, str] = {}
    problems: list[str] = []
    for key, value in given.items():
        name = others.get(key, key)
        conversion = _CONVERSIONS.get((section, key))
        if conversion is not None:
            try:
                value = conversion.inward(value)
            except ValueError:
                problems.append(problem(f"{section}.{key}", value, conversion.expected))
                continue
        if name in content and content[name] != value:
            problems.append(
                f"{section}.{name}: given twice, {section}.{found[name]} = {given[found[name]]!r} and "
                f"{section}.{key} = {given[key]!r}; expected one of them"
            )
            continue
        content[name] = value
        found[name] = key
    return content, problems


def other_value(section: str, spelling: str, value: Any) -> Any:
    """Return what another spelling of a field reads as, given the field's value.

    Args:
        section: Name of the section.
        spelling: The other spelling.
        value: Value of the canonical field.

    Returns:
        The value that, given under this spelling, means the same; None if there is none.

    Example:
        >>> other_value("preemption", "max_checkpoint_sec", 5.0)
        300.0
    """
    conversion = _CONVERSIONS.get((section, spelling))
    return value if conversion is None else conversion.outward(value)


def _gres(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).isdecimal():
        raise ValueError
    return f"gpu:{int(value)}" if int(value) else None


def _graphics_cards(gres: Any) -> int | None:
    kind, _, count = str(gres).rpartition(":")
    return int(count) if kind.split(":")[0] == "gpu" and count.isdecimal() else None


def _arguments(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ValueError
    arguments = []
    for key, entry in value.items():
        option = key if key.startswith("-") else f"--{key}"
        if isinstance(entry, (Mapping, list, tuple)):
            raise ValueError
        if entry is True:
            arguments.append(option)
        elif entry is not None and entry is not False:
            arguments.append(f"{option}={entry}")
    return arguments


def _options(arguments: Any) -> dict[str, Any]:
    pairs = (argument.removeprefix("--").partition("=") for argument in arguments)
    return {key: value if equals else True for key, equals, value in pairs}


def _minutes(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value) / 60


def _precision(value: Any) -> str | None:
    texts = {"true": True, "false": False}
    flag = texts.get(value.lower(), value) if isinstance(value, str) else value
    if flag is not None and not isinstance(flag, bool):
        raise ValueError
    return "16-mixed" if flag else None


def _signal_names(value: Any) -> list[Any]:
    several = value if isinstance(value, (list, tuple)) else [value]
    return [_signal_name(entry) for entry in several]


def _signal_name(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    if isinstance(value, str) and not value.isdecimal():
        return value
    return signal.Signals(int(value)).name


def _first(values: Any) -> Any:
    return values[0] if values else None


def _unchanged(value: Any) -> Any:
    return value


_SIGNALS = Conversion("names or numbers of signals, such as SIGUSR1", _signal_names, _unchanged)
# Canonical names appear as well where several forms of a value are accepted.
_CONVERSIONS: dict[tuple[str, str], Conversion] = {
    ("slurm", "gpus_per_node"): Conversion("a whole number or null", _gres, _graphics_cards),
    ("slurm", "extra_args"): Conversion(
        "a dict of options, true for one without value (a list belongs under slurm.additional_args)",
        _arguments,
        _options,
    ),
    ("preemption", "max_checkpoint_sec"): Conversion("a number of seconds", _minutes, lambda minutes: minutes * 60),
    ("preemption", "signal"): Conversion("name or number of a signal, such as SIGUSR1", _signal_names, _first),
    ("preemption", "signals"): _SIGNALS,
    ("preemption", "requeue_signals"): _SIGNALS,
    ("performance", "use_amp"): Conversion("true or false", _precision, lambda precision: precision is not None),
}
