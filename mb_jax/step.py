"""The fused training step: forward, loss, backward, clipping and update of all models in one program.

The arrays that a step replaces are donated to it. Everything that may change between steps (learning rates, arguments
of the loss, who is active) is an input of the program.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from bridge.arrays import to_jax, to_numpy
from bridge.dtypes import torch_dtypes
from mb_jax.mirror import MirrorBuffer
from mb_jax.optim import JaxOptimizer, arrays_of, keep
from mb_jax.programs import OtherValues, signature
from mb_jax.resident import ResidentData
from mb_jax.rng import Random
from mb_jax.sharding import ONE_DEVICE, Layout, placed
from mb_jax.step_context import KnownProgram, Presence, StepContext
from mb_jax.step_in_pieces import StepInPieces
from mb_jax.step_program import Constants, State, StepInputs, Updates
from mb_jax.uninterrupted import Uninterrupted
from mb_torch.backend import StepSpec
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.parts import plan_parts
from mb_torch.stacked.rows import rows_of
from mb_torch.stacked.step_update import check_optimizer

if TYPE_CHECKING:
    from mb_jax.engine import JaxBackend

Arrays = list[jax.Array]


class FusedStep:
    """One training step over the batches of one or more backends; see `mb_torch.make_joint_step`."""

    def __init__(self, spec: StepSpec, backends: Sequence[JaxBackend]) -> None:
        self.spec = spec
        self._context = StepContext(spec, backends)
        self._pieces = StepInPieces(self._context)
        self._resident = ResidentData()
        self._looks_at_rows: set[Hashable] = set()
        for backend, optimizer in zip(backends, spec.optimizers, strict=True):
            if optimizer is not None:
                check_optimizer(backend.definition, optimizer, spec)

    @property
    def backends(self) -> list[JaxBackend]:
        """Those of the batches."""
        return self._context.backends

    def __call__(self, inputs: Any, targets: Any, *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step; return the losses ``[num_models]`` and the loss's aux."""
        with torch_dtypes():
            return self._call(self._arguments(inputs, targets, shared_targets))

    def _call(self, arguments: Arguments) -> tuple[Tensor, Any]:
        if self._updates_in_program(arguments):
            known, results = self._train([arguments.plain()])
            return self._unpacked(known, results, self._context.layout)
        return self._pieces(arguments)

    def run(self, batches: Sequence[tuple[Any, Any]], *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step per batch, in one program if the batches are equal in form."""
        all_arguments = [self._arguments(inputs, targets, shared_targets) for inputs, targets in batches]
        first = signature(all_arguments[0].plain())
        together = len(batches) > 1 and all(signature(own.plain()) == first for own in all_arguments)
        if together and all(map(self._updates_in_program, all_arguments)):
            plain = [own.plain() for own in all_arguments]
            with torch_dtypes(), suppress(OtherValues):
                known, results = self._train(plain)
                aux = self._unpacked(known, [result[-1] for result in results])[1] if self.spec.aux else None
                return _lazily(results[0]), aux
        pairs = [self(inputs, targets, shared_targets=shared_targets) for inputs, targets in batches]
        return torch.stack([losses for losses, _ in pairs]), pairs[-1][1]

    def run_rows(self, inputs: Any, targets: Any, rows: Tensor, *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step per entry of ``rows`` ``[steps, batch]`` on rows of a data set that stays on the device."""
        batches = [self._arguments(inputs, targets, shared_targets, own) for own in rows.to(torch.int64)]
        form = signature(batches[0])
        if form in self._looks_at_rows or not self._updates_in_program(batches[0]):
            taken = [rows_of(inputs, targets, own, self.spec.shared_input, shared_targets) for own in rows]
            return self.run(taken, shared_targets=shared_targets)
        with torch_dtypes():
            try:
                known, results = self._train(batches)
            except OtherValues:
                self._looks_at_rows.add(form)
                return self.run_rows(inputs, targets, rows, shared_targets=shared_targets)
            if len(batches) == 1:
                losses, aux = self._unpacked(known, results, self._context.layout)
                return losses[None], aux
            return _lazily(results[0]), self._unpacked(known, [result[-1] for result in results])[1]

    def flush(self) -> None:
        """Make an update of gradients accumulated so far, if there are any."""
        self._pieces.flush()

    def _arguments(self, inputs: Any, targets: Any, shared_targets: bool, rows: Tensor | None = None) -> Arguments:
        own_inputs = not self.spec.shared_input
        trees = (inputs, targets, self.spec.loss_args, self.spec.shared_args, rows)
        return Arguments(trees, (own_inputs, not shared_targets, True, False, False))

    def _updates_in_program(self, arguments: Arguments) -> bool:
        """Whether forward, backward and update are one program."""
        return (
            self.spec.accumulate == 1
            and self.spec.scaler is None
            and plan_parts(self._context.num_models, None, arguments) is None
            and all(
                optimizer is None or (isinstance(optimizer, JaxOptimizer) and _trains_all(optimizer, backend))
                for optimizer, backend in zip(self.spec.optimizers, self.backends, strict=True)
            )
        )

    def _updates(self, known: KnownProgram) -> Updates:
        classes, plans = [], []
        present, owners = self._presence(known)
        for optimizer, own in zip(self.spec.optimizers, present, strict=True):
            plan = optimizer.plan(own) if isinstance(optimizer, JaxOptimizer) else None
            trains = plan is not None and bool(plan.positions)
            plans.append(plan if trains else None)
            classes.append(optimizer.optimizer_cls if trains else None)  # type: ignore[union-attr]
        return Updates(tuple(classes), tuple(plans), owners)

    def _presence(self, known: KnownProgram) -> Presence:
        """For each batch which stacks of its optimizer are trained, and which of the trained tensors are its own."""
        if known.presence is None:
            places = known.steps.places
            mirrors = self._context.mirrors()
            used = {id(mirrors[position]) for position in places.trained}
            present, owners, first = [], [], 0
            for backend, optimizer in zip(self.backends, self.spec.optimizers, strict=True):
                stacks = optimizer.stacks.values() if isinstance(optimizer, JaxOptimizer) else ()
                present.append([id(parameter) in used for parameter in stacks])
                last = first + len(backend.mirrors())
                trained = enumerate(places.trained)
                owners.append(tuple(index for index, position in trained if first <= position < last))
                first = last
            known.presence = present, tuple(owners)
        return known.presence

    def _train(self, batches: Sequence[Arguments]) -> tuple[KnownProgram, Arrays]:
        """Run one program over all batches.

        Returns:
            The program, and its results: those of one batch where the layout has them, those of several batches
            ``[steps, num_models, ...]``.
        """
        known = self._context.program(batches[0])
        known.model.check_serves(batches)
        places, count = known.steps.places, len(batches)
        updates = self._updates(known)
        optimizers: list[Any] = list(self.spec.optimizers)
        mirrors = self._context.mirrors()
        trained, changed, fixed = ([mirrors[position] for position in own] for own in places)
        states = [
            {} if plan is None else optimizer.mirrors(plan)
            for plan, optimizer in zip(updates.plans, optimizers, strict=True)
        ]
        active = self.spec.active
        pending = [
            None if plan is None else optimizer.begin_steps(plan, active, count)
            for plan, optimizer in zip(updates.plans, optimizers, strict=True)
        ]
        layout = self._context.layout
        varying, leaves, constant_leaves = self._leaves(batches, known.steps.leaves_mapped)
        random = self._context.random(known.model)
        numbers = [None if own is None else own.numbers for own in pending]
        steps = None if random is None else _steps_of(random, active, count)
        if count == 1:
            numbers = [None if own is None else [rows[0] for rows in own] for own in numbers]
            steps = None if random is None else random[1]
        numbers = [None if own is None else [layout.place(r, axis=r.ndim - 1) for r in own] for own in numbers]
        bound = self._bound()
        key = (updates, varying, bound is None, count > 1)
        if key not in known.trainers:
            known.trainers[key] = known.steps.training(
                self._context.num_models, updates, varying, clips=bound is not None, repeats=count > 1, layout=layout
            )
        state = State(
            arrays_of(trained, layout),
            arrays_of(changed, layout),
            [{name: arrays_of(own, layout) for name, own in one.items()} for one in states],
        )
        constants = Constants(
            arrays_of(fixed, layout),
            constant_leaves,
            _everyone(self._context.num_models, layout) if active is None else layout.place(to_numpy(active)),
            None if bound is None else layout.place(bound),
            None if random is None else layout.place(random[0]),
        )
        if steps is not None:
            steps = layout.place(steps, axis=steps.ndim - 1)
        # The program takes the old arrays away: until all new ones are in place, the batch is in no state to be left.
        with Uninterrupted():
            with self._context.watch("training step" if count == 1 else f"{count} training steps"):
                state, results = known.trainers[key](state, StepInputs(leaves, numbers, steps), constants)
            keep(trained, state.trained, layout)
            keep(changed, state.changed, layout)
            for own, new in zip(states, state.optimizers, strict=True):
                for name, tensors in own.items():
                    keep(tensors, new[name], layout)
            for optimizer, own_pending in zip(optimizers, pending, strict=True):
                if own_pending is not None:
                    optimizer.finish_steps(own_pending)
            if random is not None:
                self._context.advance_streams(active, count)
        return known, results if count == 1 else [layout.whole(array, axis=1) for array in results]

    def _leaves(
        self, batches: Sequence[Arguments], mapped: Sequence[bool]
    ) -> tuple[tuple[bool, ...], list[Any], list[Any]]:
        """Which leaves differ between batches, those stacked along the steps, and the others."""
        columns = [
            [own.leaves[index] for own in batches]
            for index, leaf in enumerate(batches[0].leaves)
            if isinstance(leaf, Tensor)
        ]
        has_rows = batches[0].trees[-1] is not None
        if len(batches) == 1 and not has_rows:
            return (True,) * len(columns), placed([column[0] for column in columns], mapped, self._context.layout), []
        if len(batches) == 1:
            varying = (*(False for _ in columns[1:]), True)
        else:
            varying = tuple(any(leaf is not column[0] for leaf in column) for column in columns)
        pairs = list(zip(columns, mapped, varying, strict=True))
        steps = [torch.stack(column) if len(batches) > 1 else column[0] for column, _, varies in pairs if varies]
        stacked = placed(
            steps, [flag for _, flag, varies in pairs if varies], self._context.layout, axis=int(len(batches) > 1)
        )
        same = [column[0] for column, _, varies in pairs if not varies]
        same_mapped = [flag for _, flag, varies in pairs if not varies]
        place = self._resident.placed if has_rows else placed
        return varying, stacked, place(same, same_mapped, self._context.layout)

    def report(self) -> dict[str, Any]:
        """Which translators were used, and how they compared with PyTorch."""
        return {
            "runs": "xla",
            "reason": None,
            "one_by_one": {},
            "compiled": True,
            "translations": self._context.reports(),
        }

    def _bound(self) -> Any:
        clip_norm = self.spec.clip_norm
        if clip_norm is None:
            return None
        bounds = to_numpy(clip_norm) if isinstance(clip_norm, Tensor) else clip_norm
        # A copy, as of all that the program may read after the caller has changed it.
        return np.broadcast_to(np.array(bounds, np.float64), (self._context.num_models,))

    def _unpacked(self, known: KnownProgram, results: Arrays, layout: Layout = ONE_DEVICE) -> tuple[Tensor, Any]:
        """Losses, and what the loss returned besides."""
        unpacked = known.model.packing.unpack([_lazily(array, layout) for array in results])
        return unpacked if self.spec.aux else (unpacked, None)


def _trains_all(optimizer: JaxOptimizer, backend: JaxBackend) -> bool:
    """Whether an optimizer has exactly the trainable parameters of a batch, in order."""
    own = [parameter for parameter in backend.spec.state.parameters.values() if parameter.requires_grad]
    return [*map(id, optimizer.stacks.values())] == [*map(id, own)]


def _steps_of(random: Random, active: Tensor | None, count: int) -> jax.Array:
    """Steps of the random streams, ``[steps, num_models]``; those of models that are not active stand still."""
    ticking = 1 if active is None else to_jax(active.to(torch.int64))
    return random[1] + jnp.arange(count)[:, None] * ticking


@cache
def _everyone(num_models: int, layout: Layout) -> Any:
    """A mask of active models, where all are."""
    return layout.place(np.ones(num_models, bool))


def _lazily(array: jax.Array, layout: Layout = ONE_DEVICE) -> Tensor:
    """A tensor whose values are waited for when somebody looks."""
    if not array.is_fully_addressable:
        # All processes have to take part, whether or not somebody looks.
        array, layout = layout.whole(array), ONE_DEVICE
    mirror = MirrorBuffer(layout.empty(array))
    mirror.set_array(array, layout)
    return mirror
