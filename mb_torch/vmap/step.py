"""The fused training step on ``torch.func``: losses and gradients of all models in one pass, then whole-stack updates.

In eager mode ordinary autograd differentiates the vectorised losses: it runs no functorch layer per operation in the
backward pass, which ``vmap(grad(...))`` does. Each model's loss depends on its own parameters only, so the gradient of
their sum is each model's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mb_torch.backend import StepSpec
from mb_torch.clipping import rows
from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.packing import check_loss
from mb_torch.stacked.parts import Plan, plan_parts
from mb_torch.stacked.rows import rows_of
from mb_torch.stacked.step_update import (
    Gradients,
    PendingGradients,
    Place,
    check_optimizer,
    check_update,
    update_models,
    updates_exactly,
)
from mb_torch.vmap.compiled import NotCompilable
from mb_torch.vmap.compiled_step import CompiledStep, Job, Used, trained_places
from mb_torch.vmap.mapping import Fallback, ModelMap, with_model_axis

if TYPE_CHECKING:
    from mb_torch.vmap.engine import VmapBackend


class FusedStep:
    """One training step over the batches of one or more backends; see `mb_torch.make_joint_step`."""

    def __init__(self, spec: StepSpec, backends: Sequence[VmapBackend]) -> None:
        self.spec = spec
        self.backends = list(backends)
        self.num_models = backends[0].spec.num_models
        self._models = ModelMap([backend.definition for backend in backends], self._loss_of_one_model)
        self.fallback = Fallback(self._models.definitions)
        self._compiled: tuple[dict[str, Any], CompiledStep] | None = None
        self.uncompiled = False
        self._pending = PendingGradients()
        for definition, optimizer in zip(self._models.definitions, spec.optimizers, strict=True):
            if optimizer is not None:
                check_optimizer(definition, optimizer, spec)

    def __getstate__(self) -> dict[str, Any]:
        # A compiled function belongs to one object: a copy makes its own.
        return {**self.__dict__, "_compiled": None}

    def __call__(self, inputs: Any, targets: Any, *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step; return the losses ``[num_models]`` and the loss's aux."""
        arguments = Arguments(
            (inputs, targets, self.spec.loss_args), (not self.spec.shared_input, not shared_targets, True)
        )
        active = self._active(arguments.rows)
        plan = plan_parts(self.num_models, self._chunk_size(), arguments)
        stacks = self._stacks()
        compiled = self._compiled_update(stacks) if plan is None else None
        # A compiled update makes the check itself, before anything changes.
        if compiled is None and self._pending.calls + 1 == self.spec.accumulate:
            check_update(self.spec, self._pending.active_with(active))
        saved = None if active is None else [[b.clone() for b in d.buffers()] for d in self._models.definitions]
        keys = self._keys()
        scale = self._loss_scale()
        grads: Gradients | None = None
        with torch.enable_grad():
            try:
                if compiled is not None:
                    outputs = self._train_compiled(compiled, stacks, keys, arguments.plain(), active)
                else:
                    outputs, grads = self._pass(plan, stacks, keys, arguments, scale)
            except NotCompilable as reason:
                # Nothing has run; from now on the options that were refused are not tried again.
                self.uncompiled = True
                reason.warn()
                outputs, grads = self._pass(plan, stacks, keys, arguments, scale)
        if active is not None and saved is not None:
            self._keep_frozen_buffers(saved, active)
        trace = self._models.trace
        assert trace is not None
        if trace.drew:
            self._advance_streams(active)
        if grads is not None:
            self._update_or_accumulate(grads, active)
        result = trace.packing.unpack([output.detach() for output in outputs])
        return result if self.spec.aux else (result, None)

    def _pass(
        self,
        plan: Plan | None,
        stacks: list[list[Tensor]],
        keys: Tensor | None,
        arguments: Arguments,
        scale: Tensor | None,
    ) -> tuple[list[Tensor], Gradients]:
        """Outputs, the losses first, and the gradients."""
        if plan is not None:
            return self._differentiate_parts(plan, stacks, keys, arguments, scale)
        return self._differentiate(stacks, keys, arguments.plain(), scale)

    def run(self, batches: Sequence[tuple[Any, Any]], *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step per batch."""
        results = [self(inputs, targets, shared_targets=shared_targets) for inputs, targets in batches]
        return torch.stack([losses for losses, _ in results]), results[-1][1]

    def run_rows(self, inputs: Any, targets: Any, rows: Tensor, *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step per entry of ``rows`` ``[steps, batch]``."""
        batches = [rows_of(inputs, targets, own, self.spec.shared_input, shared_targets) for own in rows]
        return self.run(batches, shared_targets=shared_targets)

    def flush(self) -> None:
        """Make an update of gradients accumulated so far, if there are any."""
        if self._pending.calls:
            grads, active = self._pending.so_far()
            check_update(self.spec, active)
            self._update_with_pending(grads, active)

    def _update_with_pending(self, grads: dict[Place, Tensor], active: Tensor | None) -> None:
        # A parameter that was frozen in between loses what it had.
        own = [grads.get(place) for place in trained_places(self._stacks())]
        update_models(self.spec, self._trained(), own, active)
        self._pending.clear()

    def _loss_of_one_model(self, *args: Any) -> Tensor | tuple[Tensor, Any]:
        *models, inputs, targets, loss_args = args
        result = self.spec.loss_fn(*models, inputs, targets, **loss_args, **self.spec.shared_args)
        if not self.spec.aux:
            return check_loss(result)
        if not isinstance(result, tuple) or len(result) != 2:
            raise InvalidInput("loss_fn with aux=True", received=type(result).__name__, expected="(loss, aux)")
        return check_loss(result[0]), result[1]

    def _active(self, row_counts: tuple[int, ...] | None) -> Tensor | None:
        """Models that train in this call: those the user leaves active and that have data."""
        active = self.spec.active
        if row_counts is None or all(row_counts):
            return active
        with_rows = torch.tensor([count > 0 for count in row_counts])
        return with_rows if active is None else active & with_rows.to(active.device)

    def _chunk_size(self) -> int | None:
        sizes = [backend.spec.chunk_size for backend in self.backends if backend.spec.chunk_size is not None]
        return min(sizes, default=None)

    def _keys(self) -> Tensor | None:
        """Random keys of the first batch that has seeds: a step draws from one stream per model."""
        return next((keys for backend in self.backends if (keys := backend.keys()) is not None), None)

    def _advance_streams(self, active: Tensor | None) -> None:
        for backend in self.backends:
            if backend.spec.streams is not None:
                backend.spec.streams.advance(active)

    def _stacks(self) -> list[list[Tensor]]:
        """All stacks per definition; those of untrained batches without gradients."""
        return [
            definition.stacks() if optimizer is not None else [stack.detach() for stack in definition.stacks()]
            for definition, optimizer in zip(self._models.definitions, self.spec.optimizers, strict=True)
        ]

    def _buffers(self, stacks: list[list[Tensor]]) -> list[Tensor]:
        """The buffers among all stacks."""
        pairs = zip(self._models.definitions, stacks, strict=True)
        return [buffer for definition, own in pairs for buffer in own[definition.num_parameters :]]

    def _trained(self) -> list[list[Tensor]]:
        """The stacks to differentiate, per definition, in the order of `_differentiate`'s gradients."""
        return [[stack for stack in own if stack.requires_grad] for own in self._stacks()]

    def _differentiate(
        self,
        stacks: list[list[Tensor]],
        keys: Tensor | None,
        arguments: Arguments,
        scale: Tensor | None,
    ) -> tuple[list[Tensor], Gradients]:
        """Outputs (the losses first) of the models of the given stacks, and the gradient of each trained one."""
        size = next((stack.shape[0] for own in stacks for stack in own), self.num_models)
        buffers = self._buffers(stacks)

        def at_once(arguments: Arguments) -> tuple[list[Tensor], Gradients]:
            compiled = self._compiled_step()
            if compiled is None and not any(backend.vectorises for backend in self.backends):
                if any(stack._backward_hooks for own in stacks for stack in own):
                    return one_by_one(arguments)
                return self._differentiate_single(stacks, keys, arguments, scale)
            with self._models.batchable():
                if compiled is None:
                    outputs, replaced = self._models.at_once(stacks, keys, arguments.trees, arguments.dims, size)
                    grads = self._backward(outputs[0], stacks, scale)
                else:
                    job = Job(stacks, keys, arguments.trees, arguments.dims, size, scale)
                    outputs, replaced, grads = compiled.gradients(
                        job, arguments.shapes, self._dry_run(job, arguments), buffers
                    )
            self._keep_replaced(stacks, replaced)
            return outputs, grads

        def one_by_one(arguments: Arguments) -> tuple[list[Tensor], Gradients]:
            return self._differentiate_one_by_one(stacks, keys, arguments, scale)

        return self.fallback.run(at_once, one_by_one, arguments, buffers)

    def _differentiate_one_by_one(
        self, stacks: list[list[Tensor]], keys: Tensor | None, arguments: Arguments, scale: Tensor | None
    ) -> tuple[list[Tensor], Gradients]:
        outputs, replaced = self._models.one_by_one(stacks, keys, arguments)
        grads = self._backward(outputs[0], stacks, scale)
        self._keep_replaced(stacks, replaced)
        return outputs, grads

    def _differentiate_single(
        self, stacks: list[list[Tensor]], keys: Tensor | None, arguments: Arguments, scale: Tensor | None
    ) -> tuple[list[Tensor], Gradients]:
        """As plain PyTorch would: with respect to leaves without a model axis, not through views of the stacks."""
        own = [[stack.detach()[0].requires_grad_(stack.requires_grad) for stack in tensors] for tensors in stacks]
        outputs, replaced = self._models.directly(own, keys, arguments)
        grads = self._backward(outputs[0], own, None if scale is None else scale[0])
        self._keep_replaced(stacks, with_model_axis(replaced))
        return with_model_axis(outputs), [None if grad is None else grad.unsqueeze(0) for grad in grads]

    def _backward(self, losses: Tensor, stacks: list[list[Tensor]], scale: Tensor | None) -> Gradients:
        trained = [stack for own in stacks for stack in own if stack.requires_grad]
        if not losses.requires_grad:
            raise InvalidInput("the loss does not depend on any parameter that is to be trained")
        scaled = losses if scale is None else losses * scale
        # The backward pass of an operation runs in the type that autocast chose for its forward pass.
        with torch.autocast(losses.device.type, enabled=False):
            ones = torch.ones_like(scaled) if scaled.dim() else None
            try:
                return list(torch.autograd.grad(scaled, trained, ones, allow_unused=True))
            except RuntimeError as error:
                if "device meta" not in str(error):
                    raise
                raise Unsupported(
                    "the backward pass runs a part of the model again, which has no parameters by then",
                    fix="Leave out torch.utils.checkpoint; chunk_size= bounds the memory of a batch.",
                ) from error

    def _loss_scale(self) -> Tensor | None:
        """Factors of the losses ``[num_models]`` that the scaler asks for, or None."""
        if self.spec.scaler is None:
            return None
        device = next(stack.device for own in self._trained() for stack in own)
        return self.spec.scaler.scale(torch.ones(self.num_models, device=device))

    def _compiled_step(self) -> CompiledStep | None:
        """The compiled form of this step, if any batch asks for compilation; a new one where the options changed."""
        options = next((b.compile_options for b in self.backends if b.compile_options is not None), None)
        if options is None:
            return None
        if self._compiled is None or self._compiled[0] is not options:
            self._compiled, self.uncompiled = (options, CompiledStep(self._models, options)), False
        return None if self.uncompiled else self._compiled[1]

    def _compiled_update(self, stacks: list[list[Tensor]]) -> CompiledStep | None:
        """The compiled form of this step if the update too can be part of its graph."""
        compiled = self._compiled_step()
        fits = (
            compiled is not None
            and not self.fallback.one_by_one
            and self.spec.accumulate == 1
            and self.spec.scaler is None
            and all(
                optimizer is None or updates_exactly(optimizer, own)
                for optimizer, own in zip(self.spec.optimizers, stacks, strict=True)
            )
        )
        return compiled if fits else None

    def _train_compiled(
        self,
        compiled: CompiledStep,
        stacks: list[list[Tensor]],
        keys: Tensor | None,
        arguments: Arguments,
        active: Tensor | None,
    ) -> list[Tensor]:
        buffers = self._buffers(stacks)

        def at_once(arguments: Arguments) -> list[Tensor]:
            job = Job(stacks, keys, arguments.trees, arguments.dims, self.num_models, None)
            with self._models.batchable():
                outputs, replaced = compiled.train(
                    job,
                    arguments.shapes,
                    self.spec.optimizers,  # type: ignore[arg-type]
                    self.spec.clip_norm,
                    active,
                    self._dry_run(job, arguments),
                    buffers,
                )
            self._keep_replaced(stacks, replaced)
            return outputs

        def one_by_one(arguments: Arguments) -> list[Tensor]:
            outputs, grads = self._differentiate_one_by_one(stacks, keys, arguments, None)
            update_models(self.spec, self._trained(), grads, active)
            return outputs

        return self.fallback.run(at_once, one_by_one, arguments, buffers)

    def _dry_run(self, job: Job, arguments: Arguments) -> Callable[[], Used]:
        """A step without consequences; says which trained stacks get a gradient."""

        def run() -> Used:
            trees = arguments.own_copies().trees
            outputs, _ = self._models.at_once(job.stacks, job.keys, trees, job.dims, job.size)
            grads = self._backward(outputs[0], job.stacks, job.scale)
            places = zip(trained_places(job.stacks), grads, strict=True)
            return tuple(place for place, grad in places if grad is not None)

        return run

    def _keep_replaced(self, stacks: list[list[Tensor]], replaced: list[Tensor]) -> None:
        """Write the buffers that forward passes replaced into the stacks."""
        assert self._models.trace is not None
        places = [(own, p) for own, ps in zip(stacks, self._models.trace.replaced, strict=True) for p in ps]
        for (own, position), value in zip(places, replaced, strict=True):
            own[position].copy_(value.detach())

    def _differentiate_parts(
        self,
        plan: Plan,
        stacks: list[list[Tensor]],
        keys: Tensor | None,
        arguments: Arguments,
        scale: Tensor | None,
    ) -> tuple[list[Tensor], Gradients]:
        """Part by part, so that only one part's activations exist at a time."""
        shares = [plan.split([stack.detach() for stack in own]) for own in stacks]
        part_keys, part_scales = plan.split_vector(keys), plan.split_vector(scale)
        outputs, grads = [], []
        for part, part_arguments in enumerate(plan.split_arguments(arguments)):
            own = [
                [t.requires_grad_() if s.requires_grad else t for t, s in zip(share[part], all_, strict=True)]
                for share, all_ in zip(shares, stacks, strict=True)
            ]
            part_outputs, part_grads = self._differentiate(
                own, part_keys[part], part_arguments.own_copies(only_shared=True), part_scales[part]
            )
            outputs.append([output.detach() for output in part_outputs])
            grads.append(part_grads)
        for definition, own_stacks, share in zip(self._models.definitions, stacks, shares, strict=True):
            first = definition.num_parameters
            plan.write_back(own_stacks[first:], [part[first:] for part in share])
        return plan.join(outputs), _join_gradients(plan, grads)

    def _keep_frozen_buffers(self, saved: list[list[Tensor]], active: Tensor) -> None:
        for definition, values in zip(self._models.definitions, saved, strict=True):
            for buffer, value in zip(definition.buffers(), values, strict=True):
                buffer.copy_(torch.where(rows(active, buffer), buffer, value))

    def _update_or_accumulate(self, grads: Gradients, active: Tensor | None) -> None:
        if self.spec.accumulate == 1:
            update_models(self.spec, self._trained(), grads, active)
            return
        pairs = zip(trained_places(self._stacks()), grads, strict=True)
        by_place = {place: grad for place, grad in pairs if grad is not None}
        share = 1 / self.spec.accumulate
        if self._pending.calls + 1 == self.spec.accumulate:
            self._update_with_pending(*self._pending.with_call(by_place, active, share))
        else:
            self._pending.add(by_place, active, share)


def _join_gradients(plan: Plan, parts: list[Gradients]) -> Gradients:
    """One gradient per stack from those of the parts; None where no part has one."""
    joined: Gradients = []
    for column in zip(*parts, strict=True):
        given = next((grad for grad in column if grad is not None), None)
        if given is None:
            joined.append(None)
            continue
        pieces = [
            given.new_zeros((size, *given.shape[1:])) if grad is None else grad
            for grad, size in zip(column, plan.sizes, strict=True)
        ]
        joined.extend(plan.join([[piece] for piece in pieces], row_wise=False))
    return joined
