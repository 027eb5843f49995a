"""Runs a vectorised function through ``torch.compile``."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mb_torch.errors import Unsupported
from mb_torch.stacked.one_model import Trace
from mb_torch.vmap.mapping import ModelMap

T = TypeVar("T")

# Graphs of one function (batch sizes, modes, settings) before torch gives up on compiling it; its own limit is 8.
_GRAPHS = 64
# A call whose graph turns out to be new is repeated, at most twice if guards see everything.
_ATTEMPTS = 8


class NotExamined(Exception):
    """Raised instead of running a graph that is new, or that was compiled for another result of the dry run."""

    def __init__(self, graph: int) -> None:
        super().__init__(graph)
        self.graph = graph


class NotCompilable(Unsupported):
    """Dynamo cannot compile a function in one piece, or was asked to compile it for too many cases."""

    def warn(self) -> None:
        """Tell the user that the function runs without."""
        warnings.warn(f"{self}; the models run vectorised, but not compiled", UserWarning, stacklevel=2)


class _Calls(Generic[T]):
    """What dry runs of the calls with one key have shown.

    Attributes:
        graphs: The map's trace and the result of the dry run, by the number of the graph.
        latest: That of the graph that ran last; None if the next call needs a dry run.
    """

    def __init__(self) -> None:
        self.graphs: dict[int, tuple[Trace, T]] = {}
        self.latest: tuple[Trace, T] | None = None

    def expects(self, graph: int) -> bool:
        """Whether the graph is known to go with what the latest dry run returned."""
        examined = self.graphs.get(graph)
        return examined is not None and self.latest is not None and examined[1] == self.latest[1]


class CompiledFunction(Generic[T]):
    """A compiled function of all models that knows the form of its results.

    A compiled function gives back tensors only. What else a run shows (the structure of the results, which buffers
    were replaced, whether random numbers were drawn) comes from a dry run, which leaves buffers and the random
    generators as they were. Dynamo's guards see whatever the function depends on, so there is one dry run for every
    graph that dynamo makes: a graph that was not examined refuses to run.

    Args:
        models: The map whose trace is to be kept right.
        function: What to compile.
        options: Keyword arguments of ``torch.compile``.
    """

    def __init__(self, models: ModelMap, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._models = models
        self._calls: dict[Hashable, _Calls[T]] = {}
        self._number_of_graphs = 0
        self._expected: _Calls[T] | None = None
        self._ran: int | None = None
        self._source, self._settings = function, self._watched(options)
        self._may_vary = options.get("dynamic") is None
        self._function = torch.compile(function, **self._settings)

    def __call__(
        self,
        key: Hashable,
        arguments: Callable[[T], Sequence[Any]],
        dry_run: Callable[[], T],
        buffers: Sequence[Tensor],
    ) -> tuple[Any, T]:
        """Call the compiled function.

        Args:
            key: What the result of the dry run depends on and the function does not see.
            arguments: Makes the arguments from what the dry run returned.
            dry_run: The function without consequences, not compiled.
            buffers: What the dry run changes, to be put back.

        Returns:
            What the function returned, and what the dry run did.

        Raises:
            NotCompilable: There is a graph break, or there were too many graphs.
            Unsupported: The compiler failed; the function itself has passed its dry run.
        """
        calls = self._calls.get(key)
        if calls is None:
            calls = self._calls[key] = _Calls()
        fresh: tuple[Trace, T] | None = None
        if calls.latest is None:
            fresh = calls.latest = self._examine(dry_run, buffers)
        for _ in range(_ATTEMPTS):
            assert calls.latest is not None
            known = calls.latest[1]
            self._expected, self._ran = calls, None
            try:
                result = self._function(*arguments(known))
            except NotExamined as new:
                if new.graph not in calls.graphs:
                    fresh = fresh or self._examine(dry_run, buffers)
                    calls.graphs[new.graph] = fresh
                calls.latest = calls.graphs[new.graph]
                continue
            except Exception as error:
                if self._may_vary and _is_runtime_error(error):
                    # Not the function's own, which has passed its dry run: there are operations, dropout among them,
                    # that cannot be traced within vmap for sizes that are to vary.
                    self._may_vary = False
                    self._function = torch.compile(self._source, **{**self._settings, "dynamic": False})
                    continue
                if _is_dynamos_limit(error):
                    raise NotCompilable(
                        f"torch.compile cannot compile them in one piece ({_summary(error)})"
                    ) from error
                if _is_compiler_failure(error):
                    raise Unsupported(
                        f"torch.compile failed: {_summary(error)}", fix="Leave out enable_compile()."
                    ) from error
                raise
            self._finish(calls, fresh)
            return result, known
        raise Unsupported(
            "torch.compile: which parameters take part in the loss depends on something that the compiler does not see",
            fix="Leave out enable_compile().",
        )

    def _finish(self, calls: _Calls[T], fresh: tuple[Trace, T] | None) -> None:
        """Set the map's trace to that of the graph that ran."""
        if fresh is not None:
            self._models.trace = fresh[0]
        elif self._ran is not None:
            self._models.trace = calls.graphs[self._ran][0]
        assert self._models.trace is not None
        if self._ran is None or self._models.trace.packing.has_numbers:
            # Not compiled (``disable=True``), or one graph for many Python numbers: every call has its own dry run.
            calls.latest = None

    def _examine(self, dry_run: Callable[[], T], buffers: Sequence[Tensor]) -> tuple[Trace, T]:
        with _unchanged(buffers, self._models):
            result = dry_run()
        assert self._models.trace is not None
        return self._models.trace, result

    def _watched(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options with a backend that numbers its graphs, and whose graphs ask before they run."""
        compile_graph = _compiler(options)

        def backend(graph: Any, inputs: Any, **settings: Any) -> Callable[..., Any]:
            compiled = compile_graph(graph, inputs, **settings)
            number = self._number_of_graphs
            self._number_of_graphs += 1

            def run(*args: Any) -> Any:
                if self._ran is None:
                    assert self._expected is not None
                    if not self._expected.expects(number):
                        raise NotExamined(number)
                    self._ran = number
                return compiled(*args)

            return run

        own = {"isolate_recompiles": True, "recompile_limit": _GRAPHS}
        known = inspect.signature(torch.compile).parameters
        # In one piece: between two graphs, and past the limit, nothing would tell what has to be examined.
        fixed = {"backend": backend, "fullgraph": True}
        return {**{name: value for name, value in own.items() if name in known}, **options, **fixed}


def _compiler(options: dict[str, Any]) -> Callable[..., Any]:
    """What ``torch.compile`` would compile graphs with."""
    backend = options.get("backend") or "inductor"
    if backend != "inductor":
        found: Callable[..., Any] = importlib.import_module("torch._dynamo").lookup_backend(backend)
        return found

    def inductor(graph: Any, inputs: Any, mode: str | None = None, options: dict[str, Any] | None = None) -> Any:
        settings = dict(options or {})
        if mode is not None and mode != "default":
            settings.update(torch._inductor.list_mode_options(mode))
        return torch._inductor.compile_fx.compile_fx(graph, inputs, config_patches=settings or None)

    importlib.import_module("torch._inductor.compile_fx")
    return inductor


def _summary(error: Exception) -> str:
    return " ".join(str(error).split()[:40])


def _is_dynamos_limit(error: Exception) -> bool:
    exceptions = importlib.import_module("torch._dynamo.exc")
    return isinstance(error, (exceptions.Unsupported, exceptions.UserError, exceptions.FailOnRecompileLimitHit))


def _is_compiler_failure(error: Exception) -> bool:
    exceptions = importlib.import_module("torch._dynamo.exc")
    # A runtime error under trace is one of the model.
    return isinstance(error, exceptions.TorchDynamoException) and not _is_runtime_error(error)


def _is_runtime_error(error: Exception) -> bool:
    return isinstance(error, importlib.import_module("torch._dynamo.exc").TorchRuntimeError)


@contextmanager
def _unchanged(buffers: Sequence[Tensor], models: ModelMap) -> Iterator[None]:
    """Within the block, nothing happens to buffers, counters in attributes and random generators that lasts."""
    tensors = [tensor for definition in models.definitions for tensor in definition.stacks()]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    saved = [buffer.clone() for buffer in buffers]
    modules = [module for definition in models.definitions for module in definition.prototype.modules()]
    attributes = [{name: value for name, value in vars(module).items() if _is_plain(value)} for module in modules]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
            for module, plain in zip(modules, attributes, strict=True):
                vars(module).update(plain)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
