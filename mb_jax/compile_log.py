"""Counts what JAX compiles, and says once how long each program took."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.monitoring

logger = logging.getLogger("modelbatch.jax")

_COMPILED = "/jax/core/compile/backend_compile_duration"
_STAGES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _COMPILED,
)

_listening: list[CompileLog] = []


class CompileLog:
    """What was compiled for one batch or step.

    Attributes:
        compiles: How many programs.
        seconds: How long tracing and compiling them took.

    Example:
        >>> log = CompileLog()
        >>> with log.watch("a sum"):
        ...     _ = jax.jit(lambda x: x + 1)(1.0)
        >>> log.compiles
        1
    """

    def __init__(self) -> None:
        self.compiles = 0
        self.seconds = 0.0

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Within the block, compiles count here; afterwards one line says how long ``what`` took, if it compiled."""
        compiles, seconds = self.compiles, self.seconds
        _listening.append(self)
        try:
            yield
        finally:
            _listening.pop()
            if self.compiles > compiles:
                logger.info("compiled %s in %.1f s", what, self.seconds - seconds)

    def heard(self, event: str, seconds: float) -> None:
        """Take note of an event of JAX."""
        self.seconds += seconds
        self.compiles += event == _COMPILED


def _on_duration(event: str, duration_secs: float, **_: Any) -> None:
    if _listening and event in _STAGES:
        _listening[-1].heard(event, duration_secs)


jax.monitoring.register_event_duration_secs_listener(_on_duration)
