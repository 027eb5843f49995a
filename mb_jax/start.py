"""What happens once, when the XLA backend is first used: settings of JAX, and one line each about what is unusual.

Everything here is for the whole process, as JAX's own settings are.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from mb_torch.errors import InvalidInput
from mb_torch.host_memory import keep_freed_memory

_logger = logging.getLogger("modelbatch.jax")

CACHE_VARIABLE = "MODELBATCH_JAX_CACHE"
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_HOST_DEVICES = "xla_force_host_platform_device_count"
# Each device is dispatched to in turn; nobody has measured more.
_MOST_HOST_DEVICES = 8
_LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

# The versions that the tests ran with.
TESTED = {"jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "torch": "2.13.0"}


@cache
def prepare() -> None:
    """Do what has to be done before JAX looks for devices.

    On a GPU JAX takes three quarters of the memory when it starts, which PyTorch then lacks. Unless the environment
    says otherwise, it takes what it needs instead.

    A CPU becomes several devices, one for each core up to 8, so that models can be spread over them: every core then
    runs the program of its own models, where one device shares out each small operation. ``$JAX_NUM_CPU_DEVICES`` or
    ``--xla_force_host_platform_device_count`` in ``$XLA_FLAGS`` say how many otherwise. Once JAX knows its devices,
    they stay as they are.

    Example:
        >>> prepare()
        >>> _PREALLOCATE in os.environ
        True
    """
    _show()
    keep_freed_memory()
    os.environ.setdefault(_PREALLOCATE, "false")
    if jax.config.values["jax_num_cpu_devices"] < 1 and _HOST_DEVICES not in os.environ.get("XLA_FLAGS", ""):
        # JAX has been used before.
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(usable_cores(), _MOST_HOST_DEVICES))
    untested = untested_versions()
    if untested:
        versions = ", ".join(f"{name} {version} (tested: {TESTED[name]})" for name, version in untested.items())
        _logger.info("not the versions this was tested with: %s", versions)


class _Shown(logging.StreamHandler[Any]):
    """Writes to standard error as long as the program has not said where log lines go."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers:
            super().emit(record)


def _show() -> None:
    """Let the lines about devices and compile times be seen: who waits for a compiler wants to know for what.

    They are log lines of ``modelbatch.jax`` like all others: ``logging.basicConfig`` or another level take over.
    """
    if _logger.hasHandlers() or _logger.level != logging.NOTSET:
        return
    handler = _Shown()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)


def usable_cores() -> int:
    """How many cores this process may run on.

    Example:
        >>> usable_cores() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def announce() -> None:
    """Say once that there is no accelerator. JAX looks for its devices now, if it has not before.

    Example:
        >>> announce()
    """
    if jax.default_backend() == "cpu":
        _logger.info("XLA runs on the CPU")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that results depend on; those that are not installed are left out.

    Example:
        >>> "jax" in installed_versions()
        True
    """
    versions = {}
    for name in TESTED:
        # Batches need no flax.
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def untested_versions() -> dict[str, str]:
    """Installed versions that differ from those that the tests ran with.

    Example:
        >>> set(untested_versions()) <= set(TESTED)
        True
    """
    # A PyTorch for one kind of device calls itself 2.13.0+cpu.
    versions = installed_versions()
    return {name: version for name, version in versions.items() if version.partition("+")[0] != TESTED[name]}


def use_cache(folder: str | os.PathLike[str] | None) -> None:
    """Keep compiled programs in a folder, from where this process and later ones take them.

    All programs of the process are kept there, however quickly they were compiled, unless
    ``$JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`` says which are worth it.

    Args:
        folder: Made when needed. Default: ``$MODELBATCH_JAX_CACHE``; without it nothing changes.

    Raises:
        InvalidInput: The process keeps its programs in another folder already.

    Example:
        >>> use_cache(None)
    """
    folder = folder or os.environ.get(CACHE_VARIABLE)
    if not folder:
        return
    chosen = Path(folder).absolute()
    present = jax.config.values["jax_compilation_cache_dir"]
    if present is not None and Path(present).absolute() == chosen:
        return
    if present is not None:
        raise InvalidInput(
            "cache_dir",
            received=str(chosen),
            expected=f"{present}, which this process uses already",
            fix="A process has one folder for compiled programs: give all batches the same.",
        )
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    if _LEAST_SECONDS not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX decides at its first program whether there is a folder.
    compilation_cache.reset_cache()
