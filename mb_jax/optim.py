"""Per-model optimizers as optax transformations over whole stacks, inside compiled programs.

Parameter groups, counters, checks and the form of state dicts are those of the torch backend, so states go from one
to the other in the middle of a run. Counters and what follows from them are computed on the host, exactly as
``torch.optim`` does; programs get a few numbers per model, so that no change of a hyper-parameter compiles anything.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor

from bridge.arrays import to_numpy
from bridge.dtypes import torch_dtypes
from mb_jax.mirror import MirrorBuffer, MirrorView
from mb_jax.sharding import ONE_DEVICE, Layout, along
from mb_jax.transforms import transform_for
from mb_jax.uninterrupted import Uninterrupted
from mb_torch.stacked.model_view import ModelView, Stack
from mb_torch.stacked.optim import StackedOptimizer
from mb_torch.stacked.optimizer_state import StackedOptimizerState
from mb_torch.stacked.update_rules import RULES
from mb_torch.stacked.updates import next_step

Arrays = list[jax.Array]
StateArrays = dict[str, Arrays]


class MirrorStack(Stack):
    """A stacked parameter whose values live in a JAX array."""

    def view(self, model: int) -> ModelView:
        """Return model i's part as a leaf of its own."""
        return MirrorView(self, model)


class MirrorState(StackedOptimizerState):
    """State tensors whose values live in JAX arrays."""

    def stored(self, tensor: Tensor) -> Tensor:
        """The form in which a state tensor is kept."""
        return tensor if isinstance(tensor, MirrorBuffer) else MirrorBuffer(tensor)


class UpdatePlan(NamedTuple):
    """What an update program is specialised on.

    Attributes:
        positions: Stacks that get a gradient.
        clock_of: For each of them, which row of numbers it uses.
        names: What the numbers are called, for each clock.
        flags: The course of the update.
    """

    positions: tuple[int, ...]
    clock_of: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    flags: tuple[tuple[str, bool], ...]


class PendingSteps(NamedTuple):
    """Updates that have not run yet.

    Attributes:
        numbers: For each clock its coefficients, ``[steps, count, num_models]`` in float64.
        counters: Counters after the updates, by clock.
        updates: How many there are.
    """

    numbers: list[np.ndarray[Any, Any]]
    counters: dict[int, list[Any]]
    updates: int


class JaxOptimizer(StackedOptimizer):
    """A `StackedOptimizer` whose updates are compiled programs over arrays."""

    state_cls: ClassVar[type[StackedOptimizerState]] = MirrorState

    @cached_property
    def optimizer_cls(self) -> type[torch.optim.Optimizer]:
        """The class of torch.optim whose updates these are; Adam stands for AdamW too."""
        # A copy of an optimizer has a copy of the rule.
        return next(cls for cls, rule in RULES.items() if type(rule) is type(self.rule))

    def _current_storage(self) -> list[tuple[int, torch.dtype, torch.device]]:
        # Without a look at the values, and without asking every mirror whether it minds.
        with torch._C.DisableTorchFunctionSubclass():
            return super()._current_storage()

    def plan(self, present: Sequence[bool]) -> UpdatePlan:
        """How an update of the stacks for which ``present`` holds runs, with the groups as they are."""
        self.follow_stacks()
        flags = tuple(sorted(_general(self._read_groups().flags).items()))
        state = self._stacked_state
        state.split_clocks(present)
        key: Hashable = ("plan", tuple(present), flags, tuple(state.clock_of))
        if key not in self._compilables:
            positions = tuple(position for position, wanted in enumerate(present) if wanted)
            clocks = sorted({state.clock_of[position] for position in positions})
            self._compilables[key] = UpdatePlan(  # type: ignore[assignment]
                positions,
                tuple(clocks.index(state.clock_of[position]) for position in positions),
                tuple(tuple(sorted(self._coefficients(state.clocks[clock], None)[1])) for clock in clocks),
                flags,
            )
        return self._compilables[key]  # type: ignore[return-value]

    def _coefficients(self, counters: Sequence[Any], active: Tensor | None) -> tuple[list[Any], dict[str, Any]]:
        """Counters after one more step, and the step's numbers, from the groups as `plan` has read them."""
        hyper = self._hyper
        assert hyper is not None
        ticked, numbers = next_step(self.rule, counters, hyper.values, hyper.flags, active)
        flags = _general(hyper.flags)
        if flags.get("shrink"):
            numbers.setdefault("shrink", 1.0)
        if flags.get("some_without"):
            numbers.setdefault("with_momentum", True)
        return ticked, numbers

    def begin_steps(self, plan: UpdatePlan, active: Tensor | None, count: int) -> PendingSteps:
        """Return the numbers of the next updates; nothing is counted before `finish_steps`."""
        clocks = sorted({self._stacked_state.clock_of[position] for position in plan.positions})
        counters = {clock: self._stacked_state.clocks[clock] for clock in clocks}
        numbers = [np.empty((count, len(names), self.num_models)) for names in plan.names]
        for step in range(count):
            for clock, names, rows in zip(clocks, plan.names, numbers, strict=True):
                counters[clock], own = self._coefficients(counters[clock], active)
                for row, name in zip(rows[step], names, strict=True):
                    row[:] = own[name]
        return PendingSteps(numbers, counters, count)

    def finish_steps(self, pending: PendingSteps) -> None:
        """Count updates whose program has run."""
        for clock, counters in pending.counters.items():
            self._stacked_state.clocks[clock] = counters
        self.count_updates(pending.updates)

    def mirrors(self, plan: UpdatePlan) -> dict[str, list[MirrorBuffer]]:
        """The state tensors that an update changes, by name."""
        names = self.rule.state_names(dict(plan.flags))
        return {
            name: [self._stacked_state.tensor(name, position) for position in plan.positions]  # type: ignore[misc]
            for name in names
        }

    def _update(self, grads: list[Tensor | None], active: Tensor | None) -> None:
        has_none = all(grad is None for grad in grads)
        if has_none or (active is not None and not bool(active.any())):
            return
        plan = self.plan([grad is not None for grad in grads])
        params: list[Any] = [self._stacks[position].parameter for position in plan.positions]
        layout: Layout = params[0].array_layout
        state = self.mirrors(plan)
        mask = np.ones(self.num_models, bool) if active is None else to_numpy(active)
        given = [layout.place(grads[position]) for position in plan.positions]
        pending = self.begin_steps(plan, active, 1)
        # The program takes the old arrays away.
        with Uninterrupted():
            with torch_dtypes():
                new_params, new_state = self._program(plan, layout)(
                    arrays_of(params, layout),
                    {name: arrays_of(own, layout) for name, own in state.items()},
                    given,
                    [layout.place(rows[0], axis=1) for rows in pending.numbers],
                    layout.place(mask),
                )
            # `update` itself has counted one.
            self.finish_steps(pending._replace(updates=0))
            keep(params, new_params, layout)
            for name, own in state.items():
                keep(own, new_state[name], layout)

    def _program(self, plan: UpdatePlan, layout: Layout) -> Any:
        key: Hashable = ("program", plan, layout)
        if key not in self._compilables:
            cls = self.optimizer_cls

            def program(params: Arrays, state: StateArrays, grads: Arrays, numbers: Any, mask: Any) -> Any:
                return apply_update(cls, plan, params, state, grads, numbers, mask)

            inputs = (along(), along(), along(), along(1), along())
            spread = layout.spread(program, inputs, along())
            self._compilables[key] = jax.jit(spread, donate_argnums=(0, 1))  # type: ignore[assignment]
        return self._compilables[key]


def _general(flags: Mapping[str, bool]) -> dict[str, bool]:
    """The flags of a program that serves models with and without decay, with and without momentum.

    A program of its own for models that agree would round their companions' last bits otherwise.
    """
    decoupled = flags.get("decoupled_weight_decay", False)
    general = {**flags, "penalty": not decoupled, "shrink": decoupled}
    if "momentum" in flags:
        general["some_without"] = flags["momentum"]
    return general


def arrays_of(mirrors: Sequence[Any], layout: Layout) -> Arrays:
    """The arrays of mirrors, where a program wants them."""
    return [mirror.array(layout) for mirror in mirrors]


def keep(mirrors: Sequence[Any], arrays: Sequence[jax.Array], layout: Layout = ONE_DEVICE) -> None:
    """Make arrays the values of mirrors."""
    for mirror, array in zip(mirrors, arrays, strict=True):
        mirror.set_array(array, layout)


def apply_update(
    optimizer_cls: type[torch.optim.Optimizer],
    plan: UpdatePlan,
    params: Arrays,
    state: StateArrays,
    grads: Arrays,
    numbers: Sequence[Any],
    active: Any,
) -> tuple[Arrays, StateArrays]:
    """One update of all models, for use inside a compiled program.

    Args:
        optimizer_cls: A class of torch.optim.
        plan: From `JaxOptimizer.plan`.
        params: Stacks ``[num_models, ...]`` that get a gradient.
        state: State arrays by name, aligned with ``params``.
        grads: Gradients, aligned with ``params``.
        numbers: One step of `PendingSteps.numbers`.
        active: Which models may change, bool ``[num_models]``.

    Returns:
        New parameters and state; those of models that are not active are the old ones to the bit.
    """
    transform = transform_for(optimizer_cls, dict(plan.flags))
    new_params: Arrays = list(params)
    new_state = {name: list(own) for name, own in state.items()}
    for clock, (names, rows) in enumerate(zip(plan.names, numbers, strict=True)):
        members = [index for index, owner in enumerate(plan.clock_of) if owner == clock]

        def update(
            params: Arrays, state: StateArrays, grads: Arrays, rows: Any, active: Any, names: Any = names
        ) -> Any:
            own = {name: _number(name, rows[row]) for row, name in enumerate(names)}
            updates, state = transform.update(grads, state, params, numbers=own, active=active)
            return optax.apply_updates(params, updates), state

        after, state_after = jax.vmap(update, in_axes=(0, 0, 0, 1, 0))(
            [params[index] for index in members],
            {name: [own[index] for index in members] for name, own in state.items()},
            [grads[index] for index in members],
            jnp.asarray(rows),
            active,
        )
        for place, index in enumerate(members):
            new_params[index] = where_active(active, after[place], params[index])
            for name in state:
                new_state[name][index] = state_after[name][place]
    return new_params, new_state


def _number(name: str, value: Any) -> Any:
    return value != 0 if name.startswith("with_") else value


def where_active(active: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new values of active models, the old ones of the others."""
    return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)


__all__ = ["JaxOptimizer", "MirrorStack", "UpdatePlan", "apply_update", "arrays_of", "keep", "where_active"]
