"""The default backend: ``torch.func.vmap`` over stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mb_torch.backend import Backend, BatchSpec, Capabilities, Step, StepSpec
from mb_torch.errors import InvalidInput
from mb_torch.routed import strip
from mb_torch.vmap.compiled import CompiledFunction
from mb_torch.vmap.definition import Definition
from mb_torch.vmap.mapping import Fallback, ModelMap, batch_dims, check_loss, own_copies
from mb_torch.vmap.optim import make_optimizer
from mb_torch.vmap.parts import Plan, plan_parts
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
        self.spec = spec
        self.compile_options: dict[str, Any] | None = None
        self._prepare()

    def _prepare(self) -> None:
        self.definition = Definition(self.spec.prototype, self.spec.state)
        self._models = ModelMap([self.definition], _call_model)
        self._fallback = Fallback([self.definition])
        self._loss_fallbacks: WeakKeyDictionary[Callable[..., Any], Fallback] = WeakKeyDictionary()
        self._compiled: CompiledFunction[Any] | None = None

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
        trees, flags = (args, kwargs), (per_model, per_model)
        plan = plan_parts(self.spec.num_models, self.spec.chunk_size, args, kwargs)
        stacks, keys = self.definition.stacks(), self.keys()
        if plan is None:
            outputs = self._run(stacks, keys, strip(trees), flags)
        else:
            outputs = self._run_parts(plan, stacks, keys, trees, flags)
        trace = self._models.trace
        assert trace is not None
        if trace.drew and self.spec.streams is not None:
            self.spec.streams.advance()
        return trace.packing.unpack(outputs)

    def _run_parts(
        self,
        plan: Plan,
        stacks: list[Tensor],
        keys: Tensor | None,
        trees: tuple[Any, ...],
        flags: tuple[bool, ...],
    ) -> list[Tensor]:
        own = plan.split(stacks)
        part_trees = zip(*(plan.split_tree(tree, flag) for tree, flag in zip(trees, flags, strict=True)), strict=True)
        outputs = [
            self._run(stacks, key, own_copies(trees, flags), flags)
            for stacks, key, trees in zip(own, plan.split_vector(keys), part_trees, strict=True)
        ]
        first_buffer = self.definition.num_parameters
        plan.write_back(stacks[first_buffer:], [part[first_buffer:] for part in own])
        return plan.join(outputs)

    def _run(
        self, stacks: list[Tensor], keys: Tensor | None, trees: tuple[Any, ...], flags: tuple[bool, ...]
    ) -> list[Tensor]:
        """Run the models of the given stacks, and keep what they did to their buffers."""
        size = stacks[0].shape[0] if stacks else self.spec.num_models

        def at_once(trees: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
            if not self.vectorises:
                return self._models.directly([stacks], keys, trees, flags)
            dims = batch_dims(trees, flags)
            with self._models.batchable():
                if self.compile_options is None:
                    return self._models.at_once([stacks], keys, trees, dims, size)
                if self._compiled is None:
                    self._compiled = CompiledFunction(self._models, self._models.at_once, self.compile_options)
                with torch.no_grad():
                    self._compiled.ready(
                        trees, lambda: self._models.at_once([stacks], keys, own_copies(trees), dims, size)
                    )
                return self._compiled([stacks], keys, trees, dims, size)

        outputs, replaced = self._fallback.run(
            at_once, lambda trees: self._models.one_by_one([stacks], keys, trees, flags), trees
        )
        assert self._models.trace is not None
        for position, value in zip(self._models.trace.replaced[0], replaced, strict=True):
            stacks[position].copy_(value.detach())
        return outputs

    def losses(self, loss_fn: Callable[..., Tensor], outputs: Any, targets: Any, *, shared_targets: bool) -> Tensor:
        """Evaluate one loss per model, ``[num_models]``, each on its real rows only."""
        models = ModelMap([], lambda outputs, targets: check_loss(loss_fn(outputs, targets)))
        fallback = self._loss_fallback(loss_fn)
        flags = (True, not shared_targets)

        def run(trees: tuple[Any, ...], size: int) -> list[Tensor]:
            def at_once(trees: tuple[Any, ...]) -> list[Tensor]:
                if self.spec.num_models == 1:
                    return models.directly([], None, trees, flags)[0]
                return models.at_once([], None, trees, batch_dims(trees, flags), size)[0]

            return fallback.run(at_once, lambda trees: models.one_by_one([], None, trees, flags)[0], trees)

        plan = plan_parts(self.spec.num_models, None, outputs, targets)
        if plan is None:
            return run(strip((outputs, targets)), self.spec.num_models)[0]
        parts = zip(plan.split_tree(outputs, True), plan.split_tree(targets, not shared_targets), strict=True)
        return plan.join([run(trees, size) for trees, size in zip(parts, plan.sizes, strict=True)])[0]

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
        return FusedStep(spec, backends)  # type: ignore[arg-type]

    def enable_compile(self, **kwargs: Any) -> None:
        """Compile the vectorised function from the next call on; ``kwargs`` go to ``torch.compile``."""
        self.compile_options = kwargs
        self._compiled = None

    def report(self) -> dict[str, Any]:
        """Say how the models are run, and why one after another if they are."""
        how = "one by one" if self._fallback.one_by_one else "vmap" if self.vectorises else "plain PyTorch"
        return {
            "backend": self.name,
            "runs": how,
            "reason": self._fallback.reason,
            "compiled": self.compile_options is not None,
            "chunk_size": self.spec.chunk_size,
        }


def _call_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)
