"""How an optimizer changes whole stacks of parameters, with a value of each hyper-parameter per model.

A stack holds one parameter of all models: ``[num_models, ...]``. A hyper-parameter is a `Value`: one Python float
where all models agree and the host may compute with it (then an update costs what it costs in ``torch.optim``), else a
float64 tensor ``[num_models]``. Each `Rule` is split so that it reads like the optimizer's own definition:

* `advance` moves the per-model counters (torch keeps a step count for every parameter of every model);
* `coefficients` turns counters and hyper-parameters into the few numbers an update needs, in float64 as
  ``torch.optim`` does with Python floats;
* `update` changes one bucket of stacks in place, with operations on lists of tensors;
* `update_by_kernel` does all of it for a single model, where torch has a kernel.

Models that must not change are put back to what they were, so that nothing reaches them, not even a NaN. The rules
themselves are in `mb_torch.stacked.update_rules`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mb_torch.stacked.buckets import Bucket, Value, choose, spread


class Rule(ABC):
    """One optimizer's update.

    Class attributes:
        numbers: Keys of a parameter group that may differ from model to model (`betas` become `beta1`,
            `beta2`).
        switches: Boolean keys of a parameter group; the models of a stack must agree on them.
        counters: Names of the per-model numbers kept beside the state tensors.
        first_clock: Their values before the first step.
        saved_counters: Those that a state dict has, as 0-dimensional tensors.
        always: State tensors that every update needs.
        optional: Other state tensors, each with the key of the group that says whether a model needs it.
        initial: State tensors that do not start at zero, each with the key of the group that says where.
        has_kernel: Whether torch has the whole update as one kernel, for `update_by_kernel`.
        masks: Names of those coefficients that are true or false.
    """

    numbers: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    switches: ClassVar[tuple[str, ...]] = ("maximize",)
    counters: ClassVar[tuple[str, ...]] = ("step",)
    first_clock: ClassVar[tuple[float, ...]] = (0.0,)
    saved_counters: ClassVar[tuple[str, ...]] = ("step",)
    always: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[Mapping[str, str]] = {}
    initial: ClassVar[Mapping[str, str]] = {}
    has_kernel: ClassVar[bool] = False
    masks: ClassVar[frozenset[str]] = frozenset()

    @property
    def tensors(self) -> tuple[str, ...]:
        """All state tensors there can be."""
        return (*self.always, *self.optional)

    def needed(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """State tensors of a model with this parameter group."""
        return (*self.always, *(name for name, key in self.optional.items() if group[key]))

    def flags(self, columns: Mapping[str, Sequence[float]], switches: Mapping[str, bool]) -> dict[str, bool]:
        """What decides the course of an update, as opposed to its numbers.

        Args:
            columns: Every number's values over the models.
            switches: Every switch.
        """
        decays = any(columns["weight_decay"])
        decoupled = switches.get("decoupled_weight_decay", False)
        return {**switches, "penalty": decays and not decoupled, "shrink": decays and decoupled}

    def state_names(self, flags: Mapping[str, bool]) -> tuple[str, ...]:
        """State tensors that an update with these flags needs."""
        return (*self.always, *(name for name, key in self.optional.items() if flags[key]))

    def advance(self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]) -> list[Value]:
        """Counters after one more step."""
        return [clock[0] + 1.0]

    @abstractmethod
    def coefficients(
        self, clock: Sequence[Value], hyper: Mapping[str, Value], flags: Mapping[str, bool]
    ) -> dict[str, Any]:
        """The numbers an update needs, from the advanced counters."""

    @abstractmethod
    def update(self, bucket: Bucket, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
        """Change the parameters and the state of a bucket."""

    def update_by_kernel(
        self, bucket: Bucket, clock: Sequence[Value], hyper: Mapping[str, Any], flags: Mapping[str, bool]
    ) -> None:
        """Do the same for a single model, with contiguous tensors, from the advanced counters.

        Such a kernel takes one learning rate and rounds otherwise than `update`: among several models, a change of one
        model's learning rate would change the others' last bits.
        """
        raise NotImplementedError


class Static(NamedTuple):
    """What a compiled update is specialised on; a change of it compiles anew."""

    flags: tuple[tuple[str, bool], ...]
    clock_of: tuple[int, ...]
    """For each parameter, the index of its counters."""
    names: tuple[str, ...]
    """What the step's coefficients are called."""


class UpdateInputs(NamedTuple):
    """All that `apply_updates` needs beside gradients; it writes to `params` and `state`."""

    rule: Rule
    static: Static
    params: list[Tensor]
    """Stacks ``[num_models, ...]`` that get a gradient."""
    state: dict[str, list[Tensor]]
    """State tensors by name, aligned with `params`."""
    numbers: list[Tensor]
    """For each set of counters the step's coefficients, rows ``[count, num_models]`` of float64.

    Not computed by the compiled function: the compiler would work out the powers anew for every few elements. One
    tensor, because the compiled function checks each one that it gets.
    """


def next_step(
    rule: Rule,
    clock: Sequence[Value],
    hyper: Mapping[str, Value],
    flags: Mapping[str, bool],
    active: Tensor | None,
) -> tuple[list[Value], dict[str, Any]]:
    """Counters after a step, which inactive models do not take, and the numbers of that step."""
    ticked = rule.advance(clock, hyper, flags)
    numbers = rule.coefficients(ticked, hyper, flags)
    if active is not None:
        ticked = [choose(active, new, old) for new, old in zip(ticked, clock, strict=True)]
    return ticked, numbers


def update_bucket(
    rule: Rule,
    bucket: Bucket,
    numbers: Mapping[str, Any],
    flags: Mapping[str, bool],
    active: Tensor | None,
    *,
    look: bool = False,
) -> None:
    """Update the active models of a bucket and leave every bit of the others.

    Args:
        rule: The optimizer's rule.
        bucket: What to update.
        numbers: The step's coefficients.
        flags: The step's flags.
        active: Which models may change, bool ``[num_models]``; None for all.
        look: Whether the mask may be looked at, which waits for its device. That copies inactive models only.
    """
    if active is None:
        rule.update(bucket, numbers, flags)
        return
    own = active if bucket.models is None else active[bucket.models]
    tensors = bucket.tensors()
    if look:
        frozen = (~own).nonzero().view(-1)
        if frozen.numel() == own.numel():
            return
        frozen = frozen.to(tensors[0].device)
        kept = [tensor.index_select(0, frozen) for tensor in tensors]
        rule.update(bucket, numbers, flags)
        for tensor, rows in zip(tensors, kept, strict=True):
            tensor.index_copy_(0, frozen, rows)
    else:
        before = [tensor.clone() for tensor in tensors]
        rule.update(bucket, numbers, flags)
        for tensor, old, mask in zip(tensors, before, spread(own, tensors), strict=True):
            tensor.copy_(torch.where(mask, tensor, old))


def as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Complex tensors as pairs of real numbers, which is how every optimizer treats them."""
    return [torch.view_as_real(one.resolve_conj()) if one.is_complex() else one for one in tensors]


def apply_updates(inputs: UpdateInputs, grads: Sequence[Tensor], active: Tensor | None = None) -> None:
    """One optimizer step as in-place tensor operations on what it is passed, for use inside `torch.compile`.

    Nothing is read on the host and no hyper-parameter is a constant of the graph, so that a schedule compiles nothing
    new.

    Args:
        inputs: From `StackedOptimizer.begin_update`.
        grads: Gradients, aligned with ``inputs.params``.
        active: Which models may change, bool ``[num_models]``, the same that `begin_update` got; None for all.

    Example:
        >>> from mb_torch.stacked.optim import make_optimizer
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = make_optimizer(torch.optim.SGD, [{"lr": 0.1}, {"lr": 0.5}], {"weight": weight}, 2)
        >>> pending = optimizer.begin_update()
        >>> apply_updates(pending.inputs, [torch.ones(2, 3)])
        >>> optimizer.finish_update(pending)
        >>> weight[:, 0].tolist()
        [0.8999999761581421, 0.5]
    """
    rule, static, params, state, numbers = inputs
    flags = dict(static.flags)
    for index, rows in enumerate(numbers):
        own = zip(static.names, rows, strict=True)
        own_numbers = {name: row != 0 if name in rule.masks else row for name, row in own}
        by_dtype: dict[torch.dtype, list[int]] = {}
        for position, owner in enumerate(static.clock_of):
            if owner == index:
                by_dtype.setdefault(params[position].dtype, []).append(position)
        for positions in by_dtype.values():
            bucket = Bucket(
                as_real([params[k] for k in positions]),
                as_real([grads[k] for k in positions]),
                {name: as_real([tensors[k] for k in positions]) for name, tensors in state.items()},
            )
            update_bucket(rule, bucket, own_numbers, flags, active)
