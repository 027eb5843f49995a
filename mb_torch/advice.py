"""A short trial on the user's own models that says how to train them: at once or one by one, where, in what chunks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mb_torch.backend import available_backends
from mb_torch.errors import InvalidInput, ModelBatchError
from mb_torch.optimizer import OptimizerFactory
from mb_torch.routed import routed_leaves
from mb_torch.targets import batch_length, loss_accepts, of_first_model, targets_are_shared

if TYPE_CHECKING:
    from mb_torch.core import ModelBatch

# So many are enough to know what one takes in a loop.
_MODELS_IN_LOOP = 16
_LEAST_STEPS = 3
# What batching must win to be worth a dependency on it.
_WORTH = 1.05


@dataclass(frozen=True)
class Trial:
    """One way to train the models, and how fast it was.

    Attributes:
        backend: The backend; None is plain PyTorch, one model after another.
        chunk_size: How many models run at a time; None is all.
        compiled: Whether ``enable_compile()`` was called.
        seconds: Seconds of a step of all models, the median; None if it failed.
        first_seconds: Seconds of the first step, compilation included; None if it failed.
        failure: Why it failed; None if it did not.

    Example:
        >>> print(Trial("torch", chunk_size=16))
        backend='torch', chunk_size=16
    """

    backend: str | None
    chunk_size: int | None = None
    compiled: bool = False
    seconds: float | None = None
    first_seconds: float | None = None
    failure: str | None = None

    def __str__(self) -> str:
        if self.backend is None:
            return "one by one, plain PyTorch"
        chunks = "" if self.chunk_size is None else f", chunk_size={self.chunk_size}"
        return f"backend={self.backend!r}{', compiled' if self.compiled else ''}{chunks}"


@dataclass(frozen=True)
class Advice:
    """What a trial has found; print it to read it.

    Attributes:
        num_models: How many models were trained.
        trials: All ways that were tried, the fastest first, failed ones last.
        not_tried: What was left out, why, and how to try it; one line each.

    Example:
        >>> fused, loop = Trial("torch", seconds=0.01, first_seconds=0.1), Trial(None, seconds=0.04, first_seconds=0.1)
        >>> advice = Advice(8, (fused, loop))
        >>> advice.batch, advice.speedup, advice.options
        (True, 4.0, {'backend': 'torch', 'chunk_size': None})
    """

    num_models: int
    trials: tuple[Trial, ...]
    not_tried: tuple[str, ...] = ()

    @property
    def best(self) -> Trial:
        """The way to take: the fastest, but one by one where nothing else is 5 % faster."""
        fastest, loop = self.trials[0], self._loop
        assert fastest.seconds is not None
        return fastest if loop.seconds is None or loop.seconds >= _WORTH * fastest.seconds else loop

    @property
    def batch(self) -> bool:
        """Whether to train the models at once."""
        return self.best.backend is not None

    @property
    def speedup(self) -> float:
        """How many times as fast as one by one the way to take is."""
        loop, best = self._loop.seconds, self.best.seconds
        assert loop is not None
        assert best is not None
        return loop / best

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `ModelBatch` for the way to take; none if that is one by one.

        Example:
            >>> Advice(2, (Trial("torch", 1, seconds=1.0), Trial(None, seconds=2.0))).options
            {'backend': 'torch', 'chunk_size': 1}
        """
        return {"backend": self.best.backend, "chunk_size": self.best.chunk_size} if self.batch else {}

    @property
    def _loop(self) -> Trial:
        return next(trial for trial in self.trials if trial.backend is None)

    def __str__(self) -> str:
        lines = [f"{self.num_models} models; milliseconds a step of all, and times as fast as one by one:"]
        loop = self._loop.seconds
        for trial in self.trials:
            if trial.seconds is None or trial.first_seconds is None or loop is None:
                lines.append(f"  {'-':>9}         {trial}: {trial.failure}")
                continue
            first = f" (the first step took {trial.first_seconds:.1f} s)" if trial.first_seconds > 1 else ""
            lines.append(f"  {trial.seconds * 1e3:9.2f} {loop / trial.seconds:6.2f}  {trial}{first}")
        if not self.batch:
            lines.append("Advice: do not batch; nothing was 5 % faster than one model after another.")
        else:
            compiled = " and call enable_compile()" if self.best.compiled else ""
            given = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
            lines.append(f"Advice: ModelBatch(models, {given}){compiled}; {self.speedup:.1f} times as fast.")
        lines += [f"Not tried: {left_out}" for left_out in self.not_tried]
        return "\n".join(lines)


def advise(
    batch: ModelBatch,
    inputs: Any,
    targets: Any,
    loss_fn: Callable[..., Tensor],
    *,
    optimizer_cls: type[torch.optim.Optimizer],
    backends: Sequence[str] | None,
    compiled: bool,
    seconds: float,
    shared_targets: bool | None,
) -> Advice:
    """See `ModelBatch.advise`."""
    if routed_leaves(inputs):
        raise InvalidInput("advise", received="routed rows", expected="a batch of equally many rows for every model")
    if not seconds > 0:
        raise InvalidInput("seconds", received=seconds, expected="a positive number")
    unknown = set(backends or ()) - set(available_backends())
    if unknown:
        raise InvalidInput("backends", received=sorted(unknown), expected=f"some of {available_backends()}")
    with torch.random.fork_rng():
        trainer = _Trainer(batch, inputs, targets, loss_fn, optimizer_cls, seconds, shared_targets)
        trials, compilable = [trainer.loop()], []
        for name in available_backends() if backends is None else backends:
            trials.append(trainer.batched(Trial(name)))
            if not trainer.may_be_compiled:
                continue
            if compiled:
                trials.append(trainer.batched(Trial(name, compiled=True)))
            else:
                compilable.append(name)
        working = [trial for trial in trials if trial.backend is not None and trial.seconds is not None]
        if working:
            fastest = min(working, key=_seconds)
            sizes = dict.fromkeys(size for size in (batch.num_models // 4, batch.num_models // 16) if size > 1)
            trials += [trainer.batched(replace(Trial(fastest.backend), chunk_size=size)) for size in sizes]
    return Advice(batch.num_models, tuple(sorted(trials, key=_seconds)), tuple(map(_not_compiled, compilable)))


def _not_compiled(backend: str) -> str:
    return (
        f"enable_compile() on backend={backend!r}, because compiling takes ten seconds and more; "
        "mb.advise(..., compiled=True) tries it."
    )


def _seconds(trial: Trial) -> float:
    return float("inf") if trial.seconds is None else trial.seconds


class _Trainer:
    """Trains copies of the models, one way after another."""

    def __init__(
        self,
        batch: ModelBatch,
        inputs: Any,
        targets: Any,
        loss_fn: Callable[..., Tensor],
        optimizer_cls: type[torch.optim.Optimizer],
        seconds: float,
        shared_targets: bool | None,
    ) -> None:
        self._batch, self._inputs, self._targets = batch, inputs, targets
        self._loss_fn, self._optimizer_cls, self._budget = loss_fn, optimizer_cls, seconds
        self._shared_targets = self._are_shared() if shared_targets is None else shared_targets
        self.may_be_compiled = False

    def _are_shared(self) -> bool:
        inputs = self._inputs if self._batch.shared_input else of_first_model(self._inputs)
        with torch.no_grad():
            outputs = self._batch.model(0)(inputs)
        return targets_are_shared(
            self._targets,
            num_models=self._batch.num_models,
            batch=batch_length(self._inputs, model_axis=not self._batch.shared_input),
            loss_fits=loss_accepts(self._loss_fn, outputs),
        )

    def loop(self) -> Trial:
        """Plain PyTorch; its errors are the user's own, and are raised."""
        count = min(self._batch.num_models, _MODELS_IN_LOOP)
        models = [self._batch.model(index) for index in range(count)]
        optimizers = [self._optimizer_cls(model.parameters(), lr=_RATE) for model in models]  # type: ignore[call-arg]
        data = [
            (_of(self._inputs, i, self._batch.shared_input), _of(self._targets, i, self._shared_targets))
            for i in range(count)
        ]

        def step() -> None:
            for model, optimizer, (inputs, targets) in zip(models, optimizers, data, strict=True):
                optimizer.zero_grad()
                loss = self._loss_fn(model(inputs), targets)
                loss.backward()
                optimizer.step()
            loss.item()

        first, each = self._time(step)
        share = self._batch.num_models / count
        return Trial(None, seconds=each * share, first_seconds=first * share)

    def batched(self, trial: Trial) -> Trial:
        """All at once; what a backend cannot do is part of the answer."""
        self.may_be_compiled = False
        try:
            batch = self._copy(trial)
            factory = OptimizerFactory(self._optimizer_cls)
            optimizer = factory.create_optimizer(batch, [{"lr": _RATE}] * batch.num_models)
            train_step = batch.make_train_step(self._loss_fn, optimizer, shared_targets=self._shared_targets)
            first, each = self._time(lambda: train_step(self._inputs, self._targets).sum().item())
        except (ModelBatchError, RuntimeError, ImportError) as error:
            return replace(trial, failure=str(error).strip().split("\n", 1)[0])
        (report,) = batch.backend_report()["steps"]
        # Not where the backend compiles anyway, nor where it runs one model after another.
        is_batched = report["runs"] != "one by one"
        self.may_be_compiled = batch.backend.capabilities.torch_compile and is_batched and not report["compiled"]
        return replace(trial, seconds=each, first_seconds=first)

    def _copy(self, trial: Trial) -> ModelBatch:
        source = self._batch
        models: list[nn.Module] = [source.model(index) for index in range(source.num_models)]
        seeds = None if source.streams is None else source.streams.seeds
        batch = type(source)(
            models, source.shared_input, backend=trial.backend, chunk_size=trial.chunk_size, seeds=seeds
        )
        if trial.compiled:
            batch.enable_compile()
        return batch

    def _time(self, step: Callable[[], object]) -> tuple[float, float]:
        """Seconds of the first step, and the median of those that fit into the budget."""
        first = _timed(step)
        # The second one still fills caches.
        _timed(step)
        each: list[float] = []
        while sum(each) < self._budget or len(each) < _LEAST_STEPS:
            each.append(_timed(step))
        return first, statistics.median(each)


_RATE = 1e-4


def _timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _of(tree: Any, model: int, shared: bool) -> Any:
    return tree if shared else pytree.tree_map_only(Tensor, lambda leaf: leaf[model], tree)
