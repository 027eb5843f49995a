"""Training steps whose update is not part of the program: gradients first, which become torch tensors, then the update.

So are steps that accumulate gradients, scale losses, use an optimizer without a form in JAX, or have batches of models
with different numbers of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor

from bridge.arrays import to_torch
from mb_jax.optim import arrays_of, keep
from mb_jax.programs import part_of
from mb_jax.rng import Random
from mb_jax.sharding import ONE_DEVICE, Layout, placed
from mb_jax.step_context import KnownProgram, StepContext
from mb_jax.uninterrupted import Uninterrupted
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.parts import Plan, plan_parts
from mb_torch.stacked.step_update import Gradients, PendingGradients, Place, check_update, update_models

Arrays = list[jax.Array]


class _Pass(NamedTuple):
    """What a forward and backward pass of some models gave.

    Attributes:
        known: The program.
        results: Its results.
        grads: The gradients of what is trained.
        changed: New arrays of all models by their position among the mirrors, which do not have them yet.
    """

    known: KnownProgram
    results: Arrays
    grads: Arrays
    changed: dict[int, jax.Array]


class StepInPieces:
    """Makes steps in pieces.

    Args:
        context: The batches and programs of the step.
    """

    def __init__(self, context: StepContext) -> None:
        self._context = context
        self._pending = PendingGradients()

    def __call__(self, arguments: Arguments) -> tuple[Tensor, Any]:
        """Run one step; return the losses ``[num_models]`` and the loss's aux."""
        active = self._active(arguments)
        if self._pending.calls + 1 == self._context.spec.accumulate:
            check_update(self._context.spec, self._pending.active_with(active))
        plan = plan_parts(self._context.num_models, None, arguments)
        scale = torch.ones(self._context.num_models) if self._context.spec.scaler is None else self._loss_scale()
        if plan is None:
            layout = self._context.layout
            known, results, grads, changed = self._gradients(arguments.plain(), None, 0, scale, active, None, {})
            tensors = [layout.read(array) for array in results]
            torch_grads: Gradients = [layout.read(grad) for grad in grads]
        else:
            layout = ONE_DEVICE
            known, tensors, torch_grads, changed = self._gradients_of_parts(plan, arguments, scale, active)
        own_grads = self._by_stack(known, torch_grads)
        mirrors = self._context.mirrors()
        before = {position: mirrors[position].array(layout) for position in changed}
        with Uninterrupted():
            # First, since a forward pass may change a trained parameter too; the update then starts from there.
            self._keep(changed, layout)
            try:
                self._update_or_accumulate(own_grads, active)
            except BaseException:
                self._keep(before, layout)
                raise
            if known.model.draws:
                self._context.advance_streams(active, 1)
        unpacked = known.model.packing.unpack([tensor.detach() for tensor in tensors])
        return unpacked if self._context.spec.aux else (unpacked, None)

    def _active(self, arguments: Arguments) -> Tensor | None:
        """Models that train in this call: those the user leaves active and that have data."""
        active, counts = self._context.spec.active, arguments.rows
        if counts is None or all(counts):
            return active
        with_rows = torch.tensor([count > 0 for count in counts])
        return with_rows if active is None else active & with_rows.to(active.device)

    def _loss_scale(self) -> Tensor:
        return self._context.spec.scaler.scale(torch.ones(self._context.num_models))  # type: ignore[union-attr]

    def _gradients(
        self,
        arguments: Arguments,
        plan: Plan | None,
        part: int,
        scale: Tensor,
        active: Tensor | None,
        random: Random | None,
        changed: dict[int, jax.Array],
    ) -> _Pass:
        """Run some models; a part runs on one device, and its changes are added to those of the parts before."""
        known = self._context.program(arguments)
        layout = self._context.layout if plan is None else ONE_DEVICE
        program = known.model
        size = self._context.num_models if plan is None else plan.sizes[part]
        mirrors = self._context.mirrors()
        state = arrays_of(mirrors, layout)
        own = [part_of(plan, array, part) for array in state]
        if random is None:
            random = self._context.random(program)
        own_random = None if random is None else (part_of(plan, random[0], part), part_of(plan, random[1], part))
        if own_random is not None:
            own_random = layout.place(own_random[0]), layout.place(own_random[1])
        mask = layout.place(torch.ones(self._context.num_models, dtype=torch.bool) if active is None else active)
        tensors = [leaf for leaf in arguments.leaves if isinstance(leaf, Tensor)]
        leaves = placed(tensors, known.steps.leaves_mapped, layout)
        inputs = [*own, *leaves, part_of(plan, layout.place(scale), part)]
        with self._context.watch(f"gradients of {size}"):
            results, grads, after = known.steps.gradients(size, layout)(inputs, own_random, part_of(plan, mask, part))
        new = {
            position: _with_part(plan, changed.get(position, state[position]), part, array)
            for position, array in zip(program.changed, after, strict=True)
        }
        return _Pass(known, results, grads, {**changed, **new})

    def _keep(self, changed: dict[int, jax.Array], layout: Layout) -> None:
        mirrors = self._context.mirrors()
        keep([mirrors[position] for position in changed], [*changed.values()], layout)

    def _gradients_of_parts(
        self, plan: Plan, arguments: Arguments, scale: Tensor, active: Tensor | None
    ) -> tuple[KnownProgram, list[Tensor], Gradients, dict[int, jax.Array]]:
        known: KnownProgram | None = None
        results, grads = [], []
        changed: dict[int, jax.Array] = {}
        random: Random | None = None
        for part, share in enumerate(plan.split_arguments(arguments)):
            if random is None:
                random = self._context.random(self._context.program(share).model)
            known, own_results, own_grads, changed = self._gradients(share, plan, part, scale, active, random, changed)
            results.append([to_torch(array) for array in own_results])
            grads.append([to_torch(grad) for grad in own_grads])
        assert known is not None
        return known, plan.join(results), list(plan.join(grads, row_wise=False)), changed

    def _by_stack(self, known: KnownProgram, grads: Gradients) -> list[Gradients]:
        """Gradients of the trained stacks of each batch; None where the loss does not depend on one."""
        by_id = {
            id(mirror): grad
            for mirror, grad in zip(
                [self._context.mirrors()[position] for position in known.steps.places.trained], grads, strict=True
            )
        }
        return [[by_id.get(id(parameter)) for parameter in own] for own in self._context.trained()]

    def _update_or_accumulate(self, grads: list[Gradients], active: Tensor | None) -> None:
        if self._context.spec.accumulate == 1:
            update_models(self._context.spec, self._context.trained(), [grad for own in grads for grad in own], active)
            return
        places = {
            (definition, position): grad
            for definition, own in enumerate(grads)
            for position, grad in enumerate(own)
            if grad is not None
        }
        share = 1 / self._context.spec.accumulate
        if self._pending.calls + 1 == self._context.spec.accumulate:
            self._update_with_pending(*self._pending.with_call(places, active, share))
        else:
            self._pending.add(places, active, share)

    def flush(self) -> None:
        """Make an update of gradients accumulated so far, if there are any."""
        if self._pending.calls:
            grads, active = self._pending.so_far()
            check_update(self._context.spec, active)
            with Uninterrupted():
                self._update_with_pending(grads, active)

    def _update_with_pending(self, grads: dict[Place, Tensor], active: Tensor | None) -> None:
        stacks = self._context.trained()
        own = [grads.get((d, p)) for d, tensors in enumerate(stacks) for p, _ in enumerate(tensors)]
        update_models(self._context.spec, stacks, own, active)
        self._pending.clear()


def _with_part(plan: Plan | None, whole: jax.Array, part: int, values: jax.Array) -> jax.Array:
    if plan is None:
        return values
    first = sum(plan.sizes[:part])
    order = np.arange(plan.num_models) if plan.order is None else plan.order.numpy()
    return whole.at[order[first : first + plan.sizes[part]]].set(values)
