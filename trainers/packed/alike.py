"""Which built experiments are alike: one definition, one loss and the same data, so that they can train as one batch.

Configurations that agree say so already, but a function that builds experiments may do as it likes: choose a layer by
the learning rate, or draw its data by the seed of the weights. What is not alike is trained apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from mb_torch import IncompatibleModels, check_compatible
from trainers.built import Built
from trainers.packed.same import first_difference

_LOGGER = logging.getLogger(__name__)


def group_alike(
    experiments: Iterable[tuple[str, Built]], most: Callable[[str, Built], int]
) -> Iterator[dict[str, Built]]:
    """Divide experiments into groups that can train as one batch.

    A full group is handed out before further experiments are built, so that no more models are kept than are wanted.

    Args:
        experiments: Names and what was built, one after another.
        most: ``most(name, built)`` returns how many such experiments can train at once; 0 leaves this one out.

    Yields:
        Groups by name, in order. In each all have the loaders of the first, so that those of the others are let go.

    Example:
        >>> import torch
        >>> widths = {"a": 2, "b": 3, "c": 2, "d": 2}
        >>> loss, batches = torch.nn.functional.mse_loss, [(torch.ones(8, 4), torch.zeros(8, 2))]
        >>> built = ((name, Built(torch.nn.Linear(4, width), loss, batches)) for name, width in widths.items())
        >>> [list(group) for group in group_alike(built, lambda name, built: 2)]
        [['a', 'c'], ['b'], ['d']]
    """
    groups: list[_Group] = []
    for name, built in experiments:
        group = _group_of(name, built, groups)
        if group is None:
            size = most(name, built)
            if not size:
                continue
            group = _Group(name, built, size, {})
            groups.append(group)
        group.members[name] = replace(built, train=group.first.train, val=group.first.val)
        if len(group.members) == group.size:
            groups.remove(group)
            yield group.members
    for group in groups:
        yield group.members


@dataclass(eq=False)
class _Group:
    name: str
    first: Built
    size: int
    members: dict[str, Built]


def _group_of(name: str, built: Built, groups: Iterable[_Group]) -> _Group | None:
    reasons = []
    for group in groups:
        reason = difference(group.first, built)
        if reason is None:
            return group
        reasons.append((group.name, reason))
    for other, reason in reasons:
        _LOGGER.warning("%s cannot be trained in one batch with %s: %s", name, other, reason)
    return None


def difference(first: Built, other: Built) -> str | None:
    """Return why two experiments cannot train as one batch; None if they can.

    Args:
        first: One.
        other: The other.

    Example:
        >>> import torch
        >>> first, other = (Built(torch.nn.Dropout(p), torch.nn.functional.mse_loss, []) for p in (0.1, 0.2))
        >>> difference(first, other)
        'their models differ: p is 0.2, in model 0 0.1'
    """
    try:
        check_compatible(first.model, other.model, 1)
    except IncompatibleModels as error:
        return f"their models differ: {error.problem.partition(': ')[2]}"
    for name in ("loss_fn", "metrics", "train", "val"):
        place = first_difference(getattr(first, name), getattr(other, name), name)
        if place is not None:
            advice = "; the order of data has a seed of its own, data.custom_params.order_seed"
            return f"{place} differs{advice if name in ('train', 'val') else ''}"
    ours, theirs = _forms(first), _forms(other)
    return None if ours == theirs else f"loss_args differ: {ours} and {theirs}"


def _forms(built: Built) -> dict[str, str]:
    return {name: f"{value.dtype} {list(value.shape)}" for name, value in sorted((built.loss_args or {}).items())}
