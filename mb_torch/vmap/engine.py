"""The default backend: ``torch.func.vmap`` over stacked parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from mb_torch.backend import Backend, BatchSpec, Capabilities, Step, StepSpec
from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.host_memory import keep_freed_memory
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.optim import make_optimizer
from mb_torch.stacked.packing import check_loss
from mb_torch.stacked.parts import Plan, plan_parts
from mb_torch.vmap.compiled import CompiledFunction, NotCompilable
from mb_torch.vmap.definition import BatchableDefinition
from mb_torch.vmap.mapping import Fallback, ModelMap, with_model_axis
from mb_torch.vmap.rng import make_keys
from mb_torch.vmap.step import FusedStep

T = TypeVar("T")


class VmapBackend:
    """Runs all models of a batch in one vectorised pass.

    Args:
        spec: The definition, its stacks and the options.
    """

    name = "torch"
    capabilities = Capabilities(torch_compile=True, ragged_rows=True)

    def __init__(self, spec: BatchSpec) -> None:
        if spec.options:
            raise InvalidInput("backend_options", received=f"{[*spec.options]}", expected="none for backend='torch'")
        self.spec = spec
        self.compile_options: dict[str, Any] | None = None
        self._prepare()

    def _prepare(self) -> None:
        keep_freed_memory()
        self.definition = BatchableDefinition(self.spec.prototype, self.spec.state)
        self._models = ModelMap([self.definition], _call_model)
        self._fallback = Fallback([self.definition])
        self._loss_fallbacks: WeakKeyDictionary[Callable[..., Any], Fallback] = WeakKeyDictionary()
        self._compiled: CompiledFunction[Any] | None = None
        self._uncompiled = False
        self._steps: WeakSet[FusedStep] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions and look-up tables belong to one object: a copy makes its own.
        return {"spec": self.spec, "compile_options": self.compile_options}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.spec, self.compile_options = state["spec"], state["compile_options"]
        self._prepare()

    @property
    def vectorises(self) -> bool:
        """Whether vmap is used: a single model runs as plain PyTorch unless it is compiled."""
        return self.spec.num_models > 1 or self.compile_options is not None

    def keys(self) -> Tensor | None:
        """The models' random keys for their present steps, ``[num_models]``, or None without seeds."""
        streams = self.spec.streams
        return None if streams is None else make_keys(streams.seeds, streams.steps)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, per_model: bool) -> Any:
        """Run all models; every tensor leaf has a leading model axis if ``per_model``."""
        trees = (*args, kwargs)
        arguments = Arguments(trees, (per_model,) * len(trees))
        plan = plan_parts(self.spec.num_models, self.spec.chunk_size, arguments)
        stacks, keys = self.definition.stacks(), self.keys()
        if plan is None:
            outputs = self._run(stacks, keys, arguments.plain())
        else:
            outputs = self._run_parts(plan, stacks, keys, arguments)
        trace = self._models.trace
        assert trace is not None
        if trace.drew and self.spec.streams is not None:
            self.spec.streams.advance()
        return trace.packing.unpack(outputs)

    def _run_parts(self, plan: Plan, stacks: list[Tensor], keys: Tensor | None, arguments: Arguments) -> list[Tensor]:
        own = plan.split(stacks)
        shares = zip(own, plan.split_vector(keys), plan.split_arguments(arguments), strict=True)
        with warnings.catch_warnings():
            # Dynamo looks at this attribute of its inputs, and the shares of the stacks are no leaves.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            outputs = [self._run(stacks, key, share.own_copies(only_shared=True)) for stacks, key, share in shares]
        first_buffer = self.definition.num_parameters
        plan.write_back(stacks[first_buffer:], [part[first_buffer:] for part in own])
        return plan.join(outputs)

    def _run(self, stacks: list[Tensor], keys: Tensor | None, arguments: Arguments) -> list[Tensor]:
        """Run the models of the given stacks, and keep what they did to their buffers."""
        size = stacks[0].shape[0] if stacks else self.spec.num_models
        buffers = stacks[self.definition.num_parameters :]

        def at_once(arguments: Arguments) -> tuple[list[Tensor], list[Tensor]]:
            if not self.vectorises:
                own = [stack.squeeze(0) for stack in stacks]
                outputs, replaced = self._models.directly([own], keys, arguments)
                return with_model_axis(outputs), with_model_axis(replaced)
            with self._models.batchable():
                if self.compile_options is None or self._uncompiled:
                    return self._models.at_once([stacks], keys, arguments.trees, arguments.dims, size)
                if self._compiled is None:
                    self._compiled = CompiledFunction(self._models, self._models.at_once, self.compile_options)

                @torch.no_grad()
                def dry_run() -> None:
                    self._models.at_once([stacks], keys, arguments.own_copies().trees, arguments.dims, size)

                given = ([stacks], keys, arguments.trees, arguments.dims, size)
                try:
                    return self._compiled(arguments.shapes, lambda _: given, dry_run, buffers)[0]
                except NotCompilable as reason:
                    self._uncompiled = True
                    reason.warn()
                    return self._models.at_once(*given)

        outputs, replaced = self._fallback.run(
            at_once, lambda arguments: self._models.one_by_one([stacks], keys, arguments), arguments, buffers
        )
        assert self._models.trace is not None
        for position, value in zip(self._models.trace.replaced[0], replaced, strict=True):
            stacks[position].copy_(value.detach())
        return outputs

    def losses(self, loss_fn: Callable[..., Tensor], outputs: Any, targets: Any, *, shared_targets: bool) -> Tensor:
        """Evaluate one loss per model, ``[num_models]``, each on its real rows only."""
        models = ModelMap([], lambda outputs, targets: check_loss(loss_fn(outputs, targets)))
        fallback = self._loss_fallback(loss_fn)
        arguments = Arguments((outputs, targets), (True, not shared_targets))

        def run(arguments: Arguments, size: int) -> list[Tensor]:
            def at_once(arguments: Arguments) -> list[Tensor]:
                if self.spec.num_models == 1:
                    return with_model_axis(models.directly([], None, arguments)[0])
                return models.at_once([], None, arguments.trees, arguments.dims, size)[0]

            return fallback.run(at_once, lambda arguments: models.one_by_one([], None, arguments)[0], arguments, [])

        plan = plan_parts(self.spec.num_models, None, arguments)
        if plan is None:
            return run(arguments.plain(), self.spec.num_models)[0]
        parts = zip(plan.split_arguments(arguments), plan.sizes, strict=True)
        return plan.join([run(share, size) for share, size in parts])[0]

    def _loss_fallback(self, loss_fn: Callable[..., Tensor]) -> Fallback:
        try:
            return self._loss_fallbacks.setdefault(loss_fn, Fallback([]))
        except TypeError:  # no weak references to this kind of callable
            return Fallback([])

    def make_optimizer(
        self, optimizer_cls: type[torch.optim.Optimizer], configs: Sequence[Mapping[str, Any]]
    ) -> torch.optim.Optimizer:
        """Return an optimizer with one live parameter group per model."""
        return make_optimizer(
            optimizer_cls,
            [dict(config) for config in configs],
            self.spec.state.parameters,
            self.spec.num_models,
        )

    def make_step(self, spec: StepSpec, backends: Sequence[Backend]) -> Step:
        """Return a fused training step over the batches of ``backends``."""
        for backend in backends:
            if not isinstance(backend, VmapBackend):
                raise InvalidInput("a joint step", received=f"a batch on {backend.name!r}", expected="one backend")
        step = FusedStep(spec, backends)  # type: ignore[arg-type]
        for backend in step.backends:
            backend._steps.add(step)
        return step

    def enable_compile(self, **kwargs: Any) -> None:
        """Compile the vectorised function from the next call on; ``kwargs`` go to ``torch.compile``."""
        self.compile_options = kwargs
        self._compiled, self._uncompiled = None, False

    def to_flax(self) -> Any:
        """Refuse: the stacks are no JAX arrays."""
        raise _no_flax("to_flax")

    def load_flax(self, module: Any) -> None:
        """Refuse: the stacks are no JAX arrays."""
        raise _no_flax("load_flax")

    def report(self) -> dict[str, Any]:
        """Say how the models are run, and why one after another if they are."""
        return {
            "backend": self.name,
            **self._how(self._fallback, self._uncompiled),
            "steps": [self._how(step.fallback, step.uncompiled) for step in self._steps],
            "chunk_size": self.spec.chunk_size,
        }

    def _how(self, fallback: Fallback, uncompiled: bool) -> dict[str, Any]:
        how = "one by one" if fallback.one_by_one else "vmap" if self.vectorises else "plain PyTorch"
        compiled = self.compile_options is not None and not uncompiled and not fallback.one_by_one
        return {"runs": how, "reason": fallback.reason, "one_by_one": fallback.reasons, "compiled": compiled}


def _no_flax(method: str) -> Unsupported:
    return Unsupported(f"{method} on the torch backend", fix="Build the batch with backend='jax'.")


def _call_model(model: nn.Module, *trees: Any) -> Any:
    *args, kwargs = trees
    return model(*args, **kwargs)
