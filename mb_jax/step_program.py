"""What a training step compiles: gradients of all models, and the whole step as one donated program."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from mb_jax.groups import WorkingSet, group_size, in_groups
from mb_jax.optim import StateArrays, UpdatePlan, apply_update, where_active
from mb_jax.programs import ModelProgram, over_models, shared
from mb_jax.sharding import EVERYWHERE, ONE_DEVICE, Layout, along

Arrays = list[jax.Array]


class Places(NamedTuple):
    """Positions among the flat tensors of all definitions.

    Attributes:
        trained: Parameters that an optimizer updates and that the loss depends on.
        changed: Tensors that forward passes change and that are not trained.
        fixed: All others.
    """

    trained: tuple[int, ...]
    changed: tuple[int, ...]
    fixed: tuple[int, ...]

    @classmethod
    def of(cls, program: ModelProgram, trained: Sequence[int]) -> Places:
        """Sort the tensors of a program, of which some are trained."""
        changed = [position for position in program.changed if position not in trained]
        fixed = [p for p in range(program.num_tensors) if p not in trained and p not in changed]
        return cls(tuple(trained), tuple(changed), tuple(fixed))

    def merged(self, trained: Arrays, changed: Arrays, fixed: Arrays) -> Arrays:
        """All tensors in order."""
        positions = (*self.trained, *self.changed, *self.fixed)
        by_place = dict(zip(positions, (*trained, *changed, *fixed), strict=True))
        return [by_place[position] for position in range(len(by_place))]


class State(NamedTuple):
    """The arrays that a step replaces, and that are donated to it.

    Attributes:
        trained: Trained parameters.
        changed: Other tensors that forward passes change.
        optimizers: State of each optimizer.
    """

    trained: Arrays
    changed: Arrays
    optimizers: list[StateArrays]


class StepInputs(NamedTuple):
    """The arrays that differ from step to step.

    Attributes:
        leaves: Tensors among the arguments.
        numbers: The numbers of each optimizer's update, for each of its clocks.
        steps: Steps of the models' random streams; None where nothing is drawn.
    """

    leaves: Arrays
    numbers: list[Any]
    steps: jax.Array | None


class Constants(NamedTuple):
    """The arrays that all steps of a program share.

    Attributes:
        fixed: Tensors of the models that do not change.
        leaves: Tensors among the arguments.
        active: Which models train, bool ``[num_models]``.
        bound: Largest gradient norm of each model; None does not clip.
        seeds: Seeds of the models' random streams; None where nothing is drawn.
    """

    fixed: Arrays
    leaves: Arrays
    active: Any
    bound: Any
    seeds: jax.Array | None


class Updates(NamedTuple):
    """How gradients become updates.

    Attributes:
        classes: The class of each optimizer; None where a batch is not trained.
        plans: The plan of each optimizer.
        owners: For each batch the indices, among the trained tensors, of its own.
    """

    classes: tuple[type[torch.optim.Optimizer] | None, ...]
    plans: tuple[UpdatePlan | None, ...]
    owners: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class StepProgram:
    """A loss of one model and what becomes of its tensors.

    Attributes:
        program: The loss; its first result is the number to differentiate.
        places: What becomes of the tensors.
        mapped: For each flat input, whether it has a model axis.
        chunk_size: At most so many models run at a time.
        convolution: How convolutions are computed.
    """

    program: ModelProgram
    places: Places
    mapped: tuple[bool, ...]
    chunk_size: int | None
    convolution: str

    @property
    def leaves_mapped(self) -> tuple[bool, ...]:
        """For each tensor among the arguments, whether it has a model axis."""
        return self.mapped[self.program.num_tensors :]

    @property
    def key(self) -> Hashable:
        """Equal for programs that compute the same."""
        return self.program.key, self.places, self.mapped, self.chunk_size, self.convolution

    def gradients(self, num_models: int, layout: Layout = ONE_DEVICE) -> Callable[..., tuple[Arrays, Arrays, Arrays]]:
        """Return the compiled ``(inputs, random, active) -> (results, gradients, changed tensors)``.

        The flat inputs end with the factors of the losses ``[num_models]``. Tensors of models that are not active come
        back as they were.
        """

        def make() -> Any:
            differentiated = self._differentiated(layout.local_models(num_models))

            def gradients(inputs: Arrays, random: Any, active: Any) -> Any:
                results, grads, after = differentiated(inputs, random)
                changed = zip(self.program.changed, after, strict=True)
                return results, grads, [where_active(active, new, inputs[position]) for position, new in changed]

            inputs = [along() if flag else EVERYWHERE for flag in (*self.mapped, True)]
            return jax.jit(layout.spread(gradients, (inputs, along(), along()), along()))

        return shared(("gradients", self.key, num_models, layout), make)

    def training(
        self,
        num_models: int,
        updates: Updates,
        varying: tuple[bool, ...],
        *,
        clips: bool,
        repeats: bool,
        layout: Layout = ONE_DEVICE,
    ) -> Callable[[State, StepInputs, Constants], tuple[State, Arrays]]:
        """Return the compiled step, to which the state is donated.

        Args:
            num_models: How many models there are.
            updates: How gradients become updates.
            varying: For each tensor among the arguments, whether it is in `StepInputs` or in `Constants`.
            clips: Whether gradients are clipped.
            repeats: Whether the inputs of several steps are given, along a first axis.
            layout: Where the arrays live.
        """

        def make() -> Any:
            local = layout.local_models(num_models)
            size = local if self.chunk_size is not None else group_size(local, self._working_set, repeats=repeats)
            step = self._step(size, updates, varying, clips)

            def steps(state: State, inputs: StepInputs, constants: Constants) -> Any:
                return jax.lax.scan(lambda state, inputs: step(state, inputs, constants), state, inputs)

            inputs, results = self._axes_of_inputs(varying, repeats), along(int(repeats))
            function = in_groups(steps if repeats else step, inputs, results, size, local)
            return jax.jit(layout.spread(function, inputs, (along(), results)), donate_argnums=0)

        return shared(("training", self.key, num_models, updates, varying, clips, repeats, layout), make)

    def _working_set(self) -> WorkingSet:
        trained = [self.program.forms[position] for position in self.places.trained]
        state = sum(shape.numel() * dtype.itemsize for shape, dtype in trained)
        # Parameters, gradients, and as much again of each for the state of most optimizers.
        return WorkingSet(4 * state, self.program.bytes_written(self.convolution))

    def _axes_of_inputs(self, varying: Sequence[bool], repeats: bool) -> tuple[Any, StepInputs, Constants]:
        """Where the arguments of a step have the model axis."""
        mapped = list(zip(self.leaves_mapped, varying, strict=True))
        own = [along(int(repeats)) if flag else EVERYWHERE for flag, varies in mapped if varies]
        same = [along() if flag else EVERYWHERE for flag, varies in mapped if not varies]
        inputs: Any = StepInputs(own, along(1 + repeats), along(int(repeats)))  # type: ignore[arg-type]
        constants: Any = Constants(along(), same, along(), along(), along())  # type: ignore[arg-type]
        return along(), inputs, constants

    def _differentiated(self, num_models: int) -> Callable[..., Any]:
        """Results, gradients and changed tensors of all models, as a function of arrays."""
        places, program = self.places, self.program

        def one(inputs: Sequence[jax.Array], key: jax.Array | None) -> Any:
            *inputs, factor = inputs

            def loss_of(trained: Arrays) -> Any:
                given = list(inputs)
                for position, array in zip(places.trained, trained, strict=True):
                    given[position] = array
                results, changed = program.run_one(given, key, self.convolution)
                return results[0] * factor.astype(results[0].dtype), (results, changed)

            grads, (results, changed) = jax.grad(loss_of, has_aux=True)([inputs[p] for p in places.trained])
            # PyTorch's gradient of a complex tensor is the conjugate of JAX's.
            return results, [jnp.conj(grad) for grad in grads], changed

        return over_models(one, [*self.mapped, True], num_models, self.chunk_size)

    def _step(self, num_models: int, updates: Updates, varying: tuple[bool, ...], clips: bool) -> Callable[..., Any]:
        differentiated = self._differentiated(num_models)

        def step(state: State, inputs: StepInputs, constants: Constants) -> tuple[State, Arrays]:
            own, same = iter(inputs.leaves), iter(constants.leaves)
            leaves = [next(own if flag else same) for flag in varying]
            tensors = self.places.merged(state.trained, state.changed, constants.fixed)
            random = None if constants.seeds is None else (constants.seeds, inputs.steps)
            results, grads, after = differentiated([*tensors, *leaves, jnp.ones(num_models)], random)
            if clips:
                grads = clipped(grads, constants.bound)
            new = dict(zip(self.program.changed, after, strict=True))
            # A forward pass may change a trained parameter too; the update then starts from there.
            before = [new.get(p, array) for p, array in zip(self.places.trained, state.trained, strict=True)]
            trained, optimizers = _updated(updates, before, grads, state.optimizers, inputs.numbers, constants.active)
            active = constants.active
            return State(
                [where_active(active, one, old) for one, old in zip(trained, state.trained, strict=True)],
                [
                    where_active(active, new[position], old)
                    for position, old in zip(self.places.changed, state.changed, strict=True)
                ],
                optimizers,
            ), results

        return step


def _updated(
    updates: Updates,
    params: Arrays,
    grads: Arrays,
    states: Sequence[StateArrays],
    numbers: Sequence[Any],
    active: Any,
) -> tuple[Arrays, list[StateArrays]]:
    """Parameters and optimizer states after the update of each batch."""
    params, states = list(params), list(states)
    for batch, (cls, plan, own) in enumerate(zip(*updates, strict=True)):
        if cls is None or plan is None:
            continue
        new, states[batch] = apply_update(
            cls,
            plan,
            [params[index] for index in own],
            states[batch],
            [grads[index] for index in own],
            numbers[batch],
            active,
        )
        for index, array in zip(own, new, strict=True):
            params[index] = array
    return params, states


def clipped(grads: Arrays, bound: jax.Array) -> Arrays:
    """Scale the gradients of each model whose norm exceeds its bound, as ``clip_grad_norm_`` does.

    Args:
        grads: Each ``[num_models, ...]``.
        bound: ``[num_models]``.
    """
    norms = [jnp.sqrt(jnp.sum(jnp.square(jnp.abs(grad)).reshape(len(grad), -1), axis=1)) for grad in grads]
    total = jnp.sqrt(sum(jnp.square(norm) for norm in norms))
    factor = jnp.minimum(bound.astype(total.dtype) / (total + 1e-6), 1.0)
    # An infinite bound leaves a model alone, whose norm may be infinite too.
    factor = jnp.where(jnp.isinf(bound), 1.0, factor)
    return [grad * factor.astype(grad.dtype).reshape(-1, *[1] * (grad.ndim - 1)) for grad in grads]


__all__ = ["Constants", "Places", "State", "StepInputs", "StepProgram", "Updates", "clipped"]
