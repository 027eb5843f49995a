"""The fused training step: forward, loss, backward, clipping and update of all models in one program.

The arrays that a step replaces are donated to it. Everything that may change between steps (learning rates, arguments
of the loss, who is active) is an input of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bridge.arrays import to_jax, to_torch
from bridge.by_value import ByValue
from bridge.dtypes import torch_dtypes
from bridge.keys import surroundings
from mb_jax.convolution import convolution_form
from mb_jax.mirror import MirrorBuffer
from mb_jax.optim import JaxOptimizer, arrays_of, keep
from mb_jax.programs import (
    ModelProgram,
    OtherValues,
    part_of,
    settings,
    settings_of_callable,
    signature,
)
from mb_jax.resident import ResidentData
from mb_jax.rng import Random, random_state
from mb_jax.sharding import ONE_DEVICE, Layout, common_layout, placed
from mb_jax.step_program import Constants, Places, State, StepInputs, StepProgram, Updates
from mb_torch.backend import StepSpec
from mb_torch.errors import InvalidInput
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.packing import check_loss
from mb_torch.stacked.parts import Plan, plan_parts
from mb_torch.stacked.rows import rows_of
from mb_torch.stacked.step_update import Gradients, PendingGradients, check_optimizer, update_models
from mb_torch.trees import leaves_of

if TYPE_CHECKING:
    from mb_jax.engine import JaxBackend

Arrays = list[jax.Array]


class FusedStep:
    """One training step over the batches of one or more backends; see `mb_torch.make_joint_step`."""

    def __init__(self, spec: StepSpec, backends: Sequence[JaxBackend]) -> None:
        self.spec = spec
        self.backends = list(backends)
        self.num_models = backends[0].spec.num_models
        self._share_layout()
        self._pending = PendingGradients()
        self._resident = ResidentData()
        self._programs: ByValue[StepProgram] = ByValue()
        self._trainers: dict[Hashable, Callable[..., Any]] = {}
        self._looks_at_rows: set[Hashable] = set()
        self._present: dict[int, tuple[list[list[bool]], tuple[tuple[int, ...], ...]]] = {}
        for backend, optimizer in zip(self.backends, spec.optimizers, strict=True):
            if optimizer is not None:
                check_optimizer(backend.definition, optimizer, spec)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled programs belong to one object: a copy makes its own.
        return {**self.__dict__, "_programs": ByValue(), "_trainers": {}, "_looks_at_rows": set(), "_present": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share_layout()

    def _share_layout(self) -> None:
        layouts = [backend.layout for backend in self.backends]
        chosen = [backend.options.devices is not None for backend in self.backends]
        self.layout = common_layout(layouts, chosen)
        for backend in self.backends:
            backend.layout = self.layout

    def __call__(self, inputs: Any, targets: Any, *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step; return the losses ``[num_models]`` and the loss's aux."""
        with torch_dtypes():
            return self._call(self._arguments(inputs, targets, shared_targets))

    def _call(self, arguments: Arguments) -> tuple[Tensor, Any]:
        if self._updates_in_program(arguments):
            compiled, results = self._train([arguments.plain()])
            return self._unpacked(compiled, results, self.layout)
        return self._train_in_pieces(arguments)

    def run(self, batches: Sequence[tuple[Any, Any]], *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step per batch, in one program if the batches are equal in form."""
        all_arguments = [self._arguments(inputs, targets, shared_targets) for inputs, targets in batches]
        first = signature(all_arguments[0].plain())
        together = len(batches) > 1 and all(signature(own.plain()) == first for own in all_arguments)
        if together and all(map(self._updates_in_program, all_arguments)):
            plain = [own.plain() for own in all_arguments]
            with torch_dtypes(), suppress(OtherValues):
                compiled, results = self._train(plain)
                aux = self._unpacked(compiled, [result[-1] for result in results])[1] if self.spec.aux else None
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
                compiled, results = self._train(batches)
            except OtherValues:
                self._looks_at_rows.add(form)
                return self.run_rows(inputs, targets, rows, shared_targets=shared_targets)
            if len(batches) == 1:
                losses, aux = self._unpacked(compiled, results, self.layout)
                return losses[None], aux
            return _lazily(results[0]), self._unpacked(compiled, [result[-1] for result in results])[1]

    def flush(self) -> None:
        """Make an update of gradients accumulated so far, if there are any."""
        if self._pending.calls:
            grads, active = self._pending.take()
            own = [grads.get((d, p)) for d, tensors in enumerate(self._trained()) for p, _ in enumerate(tensors)]
            update_models(self.spec, self._trained(), own, active)

    def _arguments(self, inputs: Any, targets: Any, shared_targets: bool, rows: Tensor | None = None) -> Arguments:
        own_inputs = not self.spec.shared_input
        trees = (inputs, targets, self.spec.loss_args, self.spec.shared_args, rows)
        return Arguments(trees, (own_inputs, not shared_targets, True, False, False))

    def _updates_in_program(self, arguments: Arguments) -> bool:
        """Whether forward, backward and update are one program."""
        return (
            self.spec.accumulate == 1
            and self.spec.scaler is None
            and plan_parts(self.num_models, None, arguments) is None
            and all(
                optimizer is None or (isinstance(optimizer, JaxOptimizer) and _trains_all(optimizer, backend))
                for optimizer, backend in zip(self.spec.optimizers, self.backends, strict=True)
            )
        )

    def _loss_of_one_model(self, *args: Any) -> Any:
        *models, inputs, targets, loss_args, shared_args, rows = args
        if rows is not None:
            inputs, targets = pytree.tree_map_only(Tensor, lambda data: data.index_select(0, rows), (inputs, targets))
        result = self.spec.loss_fn(*models, inputs, targets, **loss_args, **shared_args)
        if not self.spec.aux:
            return check_loss(result)
        if not isinstance(result, tuple) or len(result) != 2:
            raise InvalidInput("loss_fn with aux=True", received=type(result).__name__, expected="(loss, aux)")
        return check_loss(result[0]), result[1]

    def _trained(self) -> list[list[Tensor]]:
        """The stacks to differentiate, per batch."""
        return [
            [p for p in backend.spec.state.parameters.values() if p.requires_grad] if optimizer is not None else []
            for backend, optimizer in zip(self.backends, self.spec.optimizers, strict=True)
        ]

    def _mirrors(self) -> list[Any]:
        return [mirror for backend in self.backends for mirror in backend.mirrors()]

    def _compiled(self, arguments: Arguments) -> StepProgram:
        key: Hashable = (
            signature(arguments),
            tuple([settings(backend.modules) for backend in self.backends]),
            tuple([backend.trainable() for backend in self.backends]),
            settings_of_callable(self.spec.loss_fn),
            surroundings(),
        )
        known = self._programs.get(key, arguments.leaves)
        if known is None or not known.program.is_current():
            known = self._translated(arguments, self._programs.places(key))
            self._programs.put(key, known.program.by_value, arguments.leaves, known)
            # What is derived from programs is known by their ids, and one may have gone.
            self._trainers, self._present = {}, {}
        return known

    def _translated(self, arguments: Arguments, tried: Sequence[int] | None) -> StepProgram:
        options = self.backends[0].options
        program = ModelProgram(
            [backend.definition for backend in self.backends],
            self._loss_of_one_model,
            [backend.example() for backend in self.backends],
            arguments,
            len(leaves_of(arguments.trees[0])),
            translator=options.translator,
            verify=options.verify,
            tried=tried,
        )
        wanted = {id(parameter) for own in self._trained() for parameter in own}
        reached = program.reached(0)
        trained = [p for p, mirror in enumerate(self._mirrors()) if id(mirror) in wanted and p in reached]
        if not trained:
            raise InvalidInput("the loss does not depend on any parameter that is to be trained")
        leaves = zip(arguments.leaves, arguments.mapped, strict=True)
        mapped = [True] * program.num_tensors + [flag for leaf, flag in leaves if isinstance(leaf, Tensor)]
        sizes = [backend.spec.chunk_size for backend in self.backends if backend.spec.chunk_size is not None]
        return StepProgram(
            program,
            Places.of(program, trained),
            tuple(mapped),
            min(sizes, default=None),
            convolution_form(options.convolution, self.num_models),
        )

    def _updates(self, compiled: StepProgram) -> Updates:
        classes, plans = [], []
        present, owners = self._presence(compiled)
        for optimizer, own in zip(self.spec.optimizers, present, strict=True):
            plan = optimizer.plan(own) if isinstance(optimizer, JaxOptimizer) else None
            trains = plan is not None and bool(plan.positions)
            plans.append(plan if trains else None)
            classes.append(optimizer.optimizer_cls if trains else None)  # type: ignore[union-attr]
        return Updates(tuple(classes), tuple(plans), owners)

    def _presence(self, compiled: StepProgram) -> tuple[list[list[bool]], tuple[tuple[int, ...], ...]]:
        """For each batch which stacks of its optimizer are trained, and which of the trained tensors are its own."""
        # Programs live as long as this step, so that their ids are their own.
        if id(compiled) not in self._present:
            mirrors = self._mirrors()
            used = {id(mirrors[position]) for position in compiled.places.trained}
            present, owners, first = [], [], 0
            for backend, optimizer in zip(self.backends, self.spec.optimizers, strict=True):
                stacks = optimizer.stacks.values() if isinstance(optimizer, JaxOptimizer) else ()
                present.append([id(parameter) in used for parameter in stacks])
                last = first + len(backend.mirrors())
                places = enumerate(compiled.places.trained)
                owners.append(tuple(index for index, position in places if first <= position < last))
                first = last
            self._present[id(compiled)] = present, tuple(owners)
        return self._present[id(compiled)]

    def _train(self, batches: Sequence[Arguments]) -> tuple[StepProgram, Arrays]:
        """Run one program over all batches.

        Returns:
            The program, and its results: those of one batch where the layout has them, those of several batches
            ``[steps, num_models, ...]``.
        """
        compiled = self._compiled(batches[0])
        compiled.program.check_serves(batches)
        places, count = compiled.places, len(batches)
        updates = self._updates(compiled)
        optimizers: list[Any] = list(self.spec.optimizers)
        mirrors = self._mirrors()
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
        layout = self.layout
        varying, leaves, constant_leaves = self._leaves(batches, compiled.leaves_mapped)
        random = self._random(compiled.program)
        numbers = [None if own is None else own.numbers for own in pending]
        steps = None if random is None else _steps_of(random, active, count)
        if count == 1:
            numbers = [None if own is None else [rows[0] for rows in own] for own in numbers]
            steps = None if random is None else random[1]
        numbers = [None if own is None else [layout.place(r, axis=r.ndim - 1) for r in own] for own in numbers]
        bound = self._bound()
        key = (id(compiled), updates, varying, bound is None, count > 1)
        if key not in self._trainers:
            self._trainers[key] = compiled.training(
                self.num_models, updates, varying, clips=bound is not None, repeats=count > 1, layout=layout
            )
        state = State(
            arrays_of(trained, layout),
            arrays_of(changed, layout),
            [{name: arrays_of(own, layout) for name, own in one.items()} for one in states],
        )
        constants = Constants(
            arrays_of(fixed, layout),
            constant_leaves,
            _everyone(self.num_models, layout) if active is None else layout.place(active.cpu().numpy()),
            None if bound is None else layout.place(bound),
            None if random is None else layout.place(random[0]),
        )
        if steps is not None:
            steps = layout.place(steps, axis=steps.ndim - 1)
        with self._watch("training step" if count == 1 else f"{count} training steps"):
            state, results = self._trainers[key](state, StepInputs(leaves, numbers, steps), constants)
        keep(trained, state.trained, layout)
        keep(changed, state.changed, layout)
        for own, new in zip(states, state.optimizers, strict=True):
            for name, tensors in own.items():
                keep(tensors, new[name], layout)
        for optimizer, own_pending in zip(optimizers, pending, strict=True):
            if own_pending is not None:
                optimizer.finish_steps(own_pending)
        if random is not None:
            self._advance_streams(active, count)
        return compiled, results if count == 1 else [layout.whole(array, axis=1) for array in results]

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
            return (True,) * len(columns), placed([column[0] for column in columns], mapped, self.layout), []
        if len(batches) == 1:
            varying = (*(False for _ in columns[1:]), True)
        else:
            varying = tuple(any(leaf is not column[0] for leaf in column) for column in columns)
        pairs = list(zip(columns, mapped, varying, strict=True))
        steps = [torch.stack(column) if len(batches) > 1 else column[0] for column, _, varies in pairs if varies]
        stacked = placed(steps, [flag for _, flag, varies in pairs if varies], self.layout, axis=int(len(batches) > 1))
        same = [column[0] for column, _, varies in pairs if not varies]
        same_mapped = [flag for _, flag, varies in pairs if not varies]
        place = self._resident.placed if has_rows else placed
        return varying, stacked, place(same, same_mapped, self.layout)

    def report(self) -> dict[str, Any]:
        """Which translators were used, and how they compared with PyTorch."""
        return {
            "runs": "xla",
            "reason": None,
            "compiled": True,
            "translations": [compiled.program.report() for compiled in self._programs.entries()],
        }

    def _watch(self, what: str) -> AbstractContextManager[None]:
        names = [type(backend.spec.prototype).__name__ for backend in self.backends]
        return self.backends[0].log.watch(f"{what} of {self.num_models} {' + '.join(names)}")

    def _bound(self) -> Any:
        clip_norm = self.spec.clip_norm
        if clip_norm is None:
            return None
        return np.broadcast_to(np.asarray(clip_norm, np.float64), (self.num_models,))

    def _random(self, program: ModelProgram) -> Random | None:
        if not program.draws:
            return None
        streams = next((b.spec.streams for b in self.backends if b.spec.streams is not None), None)
        return random_state(streams, self.num_models)

    def _advance_streams(self, active: Tensor | None, count: int) -> None:
        for backend in self.backends:
            if backend.spec.streams is not None:
                for _ in range(count):
                    backend.spec.streams.advance(active)

    def _unpacked(self, compiled: StepProgram, results: Arrays, layout: Layout = ONE_DEVICE) -> tuple[Tensor, Any]:
        """Losses, and what the loss returned besides."""
        unpacked = compiled.program.packing.unpack([_lazily(array, layout) for array in results])
        return unpacked if self.spec.aux else (unpacked, None)

    # Steps whose update is not part of the program.

    def _train_in_pieces(self, arguments: Arguments) -> tuple[Tensor, Any]:
        active = self._active(arguments)
        plan = plan_parts(self.num_models, None, arguments)
        scale = torch.ones(self.num_models) if self.spec.scaler is None else self._loss_scale()
        if plan is None:
            compiled, results, grads = self._gradients(arguments.plain(), None, 0, scale, active, None)
            tensors = [self.layout.read(array) for array in results]
            torch_grads: Gradients = [self.layout.read(grad) for grad in grads]
        else:
            compiled, tensors, torch_grads = self._gradients_of_parts(plan, arguments, scale, active)
        if compiled.program.draws:
            self._advance_streams(active, 1)
        self._update_or_accumulate(self._by_stack(compiled, torch_grads), active)
        unpacked = compiled.program.packing.unpack([tensor.detach() for tensor in tensors])
        return unpacked if self.spec.aux else (unpacked, None)

    def _active(self, arguments: Arguments) -> Tensor | None:
        """Models that train in this call: those the user leaves active and that have data."""
        active, counts = self.spec.active, arguments.rows
        if counts is None or all(counts):
            return active
        with_rows = torch.tensor([count > 0 for count in counts])
        return with_rows if active is None else active & with_rows.to(active.device)

    def _loss_scale(self) -> Tensor:
        return self.spec.scaler.scale(torch.ones(self.num_models))  # type: ignore[union-attr]

    def _gradients(
        self,
        arguments: Arguments,
        plan: Plan | None,
        part: int,
        scale: Tensor,
        active: Tensor | None,
        random: Random | None,
    ) -> tuple[StepProgram, Arrays, Arrays]:
        """Results and gradients of some models, whose changed tensors are kept; a part runs on one device."""
        compiled = self._compiled(arguments)
        layout = self.layout if plan is None else ONE_DEVICE
        program = compiled.program
        size = self.num_models if plan is None else plan.sizes[part]
        mirrors = self._mirrors()
        state = arrays_of(mirrors, layout)
        own = [part_of(plan, array, part) for array in state]
        if random is None:
            random = self._random(program)
        own_random = None if random is None else (part_of(plan, random[0], part), part_of(plan, random[1], part))
        if own_random is not None:
            own_random = layout.place(own_random[0]), layout.place(own_random[1])
        mask = layout.place(torch.ones(self.num_models, dtype=torch.bool) if active is None else active)
        tensors = [leaf for leaf in arguments.leaves if isinstance(leaf, Tensor)]
        leaves = placed(tensors, compiled.leaves_mapped, layout)
        inputs = [*own, *leaves, part_of(plan, layout.place(scale), part)]
        with self._watch(f"gradients of {size}"):
            results, grads, after = compiled.gradients(size, layout)(inputs, own_random, part_of(plan, mask, part))
        for position, array in zip(program.changed, after, strict=True):
            keep([mirrors[position]], [_with_part(plan, state[position], part, array)], layout)
        return compiled, results, grads

    def _gradients_of_parts(
        self, plan: Plan, arguments: Arguments, scale: Tensor, active: Tensor | None
    ) -> tuple[StepProgram, list[Tensor], Gradients]:
        compiled: StepProgram | None = None
        results, grads = [], []
        random: Random | None = None
        for part, share in enumerate(plan.split_arguments(arguments)):
            if random is None:
                random = self._random(self._compiled(share).program)
            compiled, own_results, own_grads = self._gradients(share, plan, part, scale, active, random)
            results.append([to_torch(array) for array in own_results])
            grads.append([to_torch(grad) for grad in own_grads])
        assert compiled is not None
        return compiled, plan.join(results), list(plan.join(grads, row_wise=False))

    def _by_stack(self, compiled: StepProgram, grads: Gradients) -> list[Gradients]:
        """Gradients of the trained stacks of each batch; None where the loss does not depend on one."""
        by_id = {
            id(mirror): grad
            for mirror, grad in zip(
                [self._mirrors()[position] for position in compiled.places.trained], grads, strict=True
            )
        }
        return [[by_id.get(id(parameter)) for parameter in own] for own in self._trained()]

    def _update_or_accumulate(self, grads: list[Gradients], active: Tensor | None) -> None:
        if self.spec.accumulate == 1:
            update_models(self.spec, self._trained(), [grad for own in grads for grad in own], active)
            return
        places = {
            (definition, position): grad
            for definition, own in enumerate(grads)
            for position, grad in enumerate(own)
            if grad is not None
        }
        self._pending.add(places, active, 1 / self.spec.accumulate)
        if self._pending.calls == self.spec.accumulate:
            self.flush()


def _trains_all(optimizer: JaxOptimizer, backend: JaxBackend) -> bool:
    """Whether an optimizer has exactly the trainable parameters of a batch, in order."""
    own = [parameter for parameter in backend.spec.state.parameters.values() if parameter.requires_grad]
    return [*map(id, optimizer.stacks.values())] == [*map(id, own)]


def _steps_of(random: Random, active: Tensor | None, count: int) -> jax.Array:
    """Steps of the random streams, ``[steps, num_models]``; those of models that are not active stand still."""
    ticking = 1 if active is None else to_jax(active.to(torch.int64))
    return random[1] + jnp.arange(count)[:, None] * ticking


def _with_part(plan: Plan | None, whole: jax.Array, part: int, values: jax.Array) -> jax.Array:
    if plan is None:
        return values
    first = sum(plan.sizes[:part])
    order = np.arange(plan.num_models) if plan.order is None else plan.order.numpy()
    return whole.at[order[first : first + plan.sizes[part]]].set(values)


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
