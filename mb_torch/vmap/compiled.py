"""Runs a vectorised function through ``torch.compile``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from mb_torch.errors import Unsupported
from mb_torch.vmap.arguments import Form
from mb_torch.vmap.definition import Definition
from mb_torch.vmap.mapping import ModelMap, Trace

T = TypeVar("T")


class CompiledFunction(Generic[T]):
    """A compiled function of all models that knows the form of its results.

    A compiled function gives back tensors only. What else a run shows (the structure of the results, which buffers
    were replaced, whether random numbers were drawn) comes from one dry run per form of the arguments, which leaves
    buffers and the random generators as they were.

    Args:
        models: The map whose trace is to be kept right.
        function: What to compile.
        options: Keyword arguments of ``torch.compile``.
    """

    def __init__(self, models: ModelMap, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._models = models
        self._function = torch.compile(function, **options)
        self._known: list[tuple[Any, Trace, T]] = []

    def ready(self, form: Form, dry_run: Callable[[], T]) -> T:
        """Set the map's trace for these arguments; return what ``dry_run`` returned when their form was new."""
        key = (form, [definition.modes() for definition in self._models.definitions])
        for known, trace, result in self._known:
            if known == key:
                self._models.trace = trace
                return result
        with _unchanged(self._models.definitions):
            result = dry_run()
        assert self._models.trace is not None
        self._known.append((key, self._models.trace, result))
        return result

    def __call__(self, *args: Any) -> Any:
        """Call the compiled function.

        Raises:
            Unsupported: The compiler failed; the function itself has passed its dry run.
        """
        try:
            return self._function(*args)
        except Exception as error:
            if _is_compiler_failure(error):
                raise Unsupported(
                    f"torch.compile failed: {' '.join(str(error).split()[:40])}", fix="Leave out enable_compile()."
                ) from error
            raise


def _is_compiler_failure(error: Exception) -> bool:
    exceptions = importlib.import_module("torch._dynamo.exc")
    # A runtime error under trace is one of the model.
    return isinstance(error, exceptions.TorchDynamoException) and not isinstance(error, exceptions.TorchRuntimeError)


class _unchanged:
    """Within the block, nothing happens to buffers and random generators that lasts."""

    def __init__(self, definitions: list[Definition]) -> None:
        self._buffers = [buffer for definition in definitions for buffer in definition.buffers()]
        tensors = [tensor for definition in definitions for tensor in definition.stacks()]
        devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
        self._fork = torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self._saved = [buffer.clone() for buffer in self._buffers]
        self._fork.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._fork.__exit__(*exception)
        for buffer, value in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(value)
