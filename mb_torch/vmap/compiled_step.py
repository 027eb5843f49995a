"""The fused training step through ``torch.compile``: gradients of all models, and where possible their updates too."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mb_torch.clipping import clip_gradients_
from mb_torch.stacked.optim import PendingUpdate, StackedOptimizer
from mb_torch.stacked.step_update import Place
from mb_torch.stacked.updates import UpdateInputs, apply_updates
from mb_torch.vmap.autocast import honoured_autocast
from mb_torch.vmap.compiled import CompiledFunction
from mb_torch.vmap.mapping import ModelMap, randomness, split_leaves

Used = tuple[Place, ...]
"""The trained stacks that take part in the loss."""


class Job(NamedTuple):
    """What one pass over the models works on.

    Attributes:
        stacks: All stacks ``[size, ...]``, per definition.
        keys: Random keys ``[size]``, or None.
        trees: Arguments of the loss.
        dims: The ``in_dims`` of vmap for their leaves.
        size: How many models there are.
        scale: Factor of each model's loss ``[size]`` for the backward pass, or None.
    """

    stacks: list[list[Tensor]]
    keys: Tensor | None
    trees: tuple[Any, ...]
    dims: tuple[int | None, ...]
    size: int
    scale: Tensor | None


class Result(NamedTuple):
    """What the loss functions returned, the buffers they replaced, and a gradient per place that has one."""

    outputs: list[Tensor]
    replaced: list[Tensor]
    grads: list[Tensor]


class CompiledStep:
    """Losses and gradients, with or without the update, as one compiled graph each.

    Gradients come from ``vmap(grad_and_value(...))``, which dynamo traces without a graph break. That form gives zeros
    where a parameter does not take part in the loss; plain PyTorch gives None there, and an optimizer must not move
    such a parameter. A dry run tells which take part.

    Args:
        models: The loss of one model.
        options: Keyword arguments of ``torch.compile``.
    """

    def __init__(self, models: ModelMap, options: dict[str, Any]) -> None:
        self._models = models
        self._gradients: CompiledFunction[Used] = CompiledFunction(models, self._differentiate, options)
        self._training: CompiledFunction[Used] = CompiledFunction(models, self._train, options)

    def gradients(
        self, job: Job, shapes: Hashable, dry_run: Callable[[], Used], buffers: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Return outputs, replaced buffers and for each trained stack its gradient, None where it takes no part.

        Args:
            job: What to work on.
            shapes: Those of the arguments.
            dry_run: Says which trained stacks get a gradient.
            buffers: All buffers among the stacks.
        """
        plain = [[stack.detach() for stack in own] for own in job.stacks]
        places = trained_places(job.stacks)
        result: Result
        result, used = self._gradients(
            (places, shapes), lambda used: (job._replace(stacks=plain), used), dry_run, buffers
        )
        grads = dict(zip(used, result.grads, strict=True))
        return result.outputs, result.replaced, [grads.get(place) for place in places]

    def train(
        self,
        job: Job,
        shapes: Hashable,
        optimizers: Sequence[StackedOptimizer | None],
        clip_norm: float | Tensor | None,
        active: Tensor | None,
        dry_run: Callable[[], Used],
        buffers: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Train the models; return outputs and replaced buffers.

        Args:
            job: What to work on; the stacks are updated.
            shapes: Those of the arguments.
            optimizers: One per definition, or None; their stacks are the trained ones, in order.
            clip_norm: As in `mb_torch.make_joint_step`.
            active: As there.
            dry_run: As in `gradients`.
            buffers: As there.
        """
        places = trained_places(job.stacks)
        updates: list[tuple[StackedOptimizer, PendingUpdate]] = []

        def arguments(used: Used) -> tuple[Any, ...]:
            updates[:] = [
                (optimizer, optimizer.begin_update([place in used for place in places if place[0] == index], active))
                for index, optimizer in enumerate(optimizers)
                if optimizer is not None
            ]
            # The very tensors of the updates: the compiler would copy aliases of inputs that it changes. Given once,
            # because it would check in every call that two of its inputs are still the same tensor.
            params = iter([param for _, pending in updates for param in pending.inputs.params])
            changed = set(used)
            plain = [
                [next(params) if (index, position) in changed else stack.detach() for position, stack in enumerate(own)]
                for index, own in enumerate(job.stacks)
            ]
            inputs = [pending.inputs._replace(params=[]) for _, pending in updates]
            bound = clip_norm
            if isinstance(clip_norm, (int, float)):
                bound = torch.tensor(clip_norm, dtype=torch.float64, device=plain[0][0].device)
            return job._replace(stacks=plain), used, inputs, bound, active

        result: Result
        result, _ = self._training((places, shapes), arguments, dry_run, buffers)
        for optimizer, pending in updates:
            optimizer.finish_update(pending)
        return result.outputs, result.replaced

    def _train(
        self,
        job: Job,
        used: Used,
        updates: list[UpdateInputs],
        clip_norm: Tensor | None,
        active: Tensor | None,
    ) -> Result:
        result = self._differentiate(job, used)
        params = iter([job.stacks[definition][position] for definition, position in used])
        grads = result.grads
        if clip_norm is not None:
            # Copies, which the compiler makes only where it has to: two parameters may share their gradient.
            grads = [grad.clone() for grad in grads]
            clip_gradients_(grads, clip_norm)
        remaining = iter(grads)
        for inputs in updates:
            own = inputs._replace(params=[next(params) for _ in inputs.static.clock_of])
            apply_updates(own, [next(remaining) for _ in own.params], active)
        return result._replace(grads=[])

    def _differentiate(self, job: Job, used: Used) -> Result:
        def loss(
            trained: list[Tensor],
            tensors: list[list[Tensor]],
            key: Tensor | None,
            mapped: list[Tensor],
            scale: Tensor | None,
            anchor: Tensor,
        ) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
            tensors = [list(own) for own in tensors]
            for (definition, position), tensor in zip(used, trained, strict=True):
                tensors[definition][position] = tensor
            with honoured_autocast():
                outputs, replaced = self._models.one(tensors, key, with_mapped(mapped))
            value = outputs[0] if scale is None else outputs[0] * scale
            return value, (outputs, replaced)

        trained = [job.stacks[definition][position] for definition, position in used]
        mapped, with_mapped = split_leaves(job.trees, job.dims)
        in_dims = (0, 0, None if job.keys is None else 0, 0, None if job.scale is None else 0, 0)
        run = torch.vmap(
            torch.func.grad_and_value(loss, has_aux=True), in_dims=in_dims, randomness=randomness(job.keys)
        )
        anchor = torch.empty(job.size, 0)
        grads, (_, (outputs, replaced)) = run(trained, job.stacks, job.keys, mapped, job.scale, anchor)
        return Result(outputs, replaced, grads)


def trained_places(stacks: list[list[Tensor]]) -> Used:
    """Where the trained stacks are."""
    return tuple(
        (definition, position)
        for definition, own in enumerate(stacks)
        for position, stack in enumerate(own)
        if stack.requires_grad
    )
