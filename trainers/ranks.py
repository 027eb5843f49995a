"""The processes of a run, and of a Slurm job: which one writes, and what they tell each other."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

from mb_torch import process_rank
from trainers.errors import TrainerError

_LOGGER = logging.getLogger(__name__)


class OtherRankFailed(TrainerError):
    """Another process of the run failed where all of them meet; its own error says why."""


class _Failure(NamedTuple):
    """What a process that failed sends in place of what the others wait for."""

    text: str


def rank() -> int:
    """Return the number of this process under ``torch.distributed``; 0 without it.

    Returns:
        The rank.

    Example:
        >>> rank()
        0
    """
    return distributed.get_rank() if is_distributed() else 0


def is_first_rank() -> bool:
    """Whether this process writes for its run: rank 0, or the only one.

    Returns:
        Judged by ``torch.distributed``, else by `mb_torch.init_distributed`. Tasks that Slurm has started, but nobody
        has connected, are runs of their own.

    Example:
        >>> is_first_rank()
        True
    """
    return rank() == 0 and (is_distributed() or process_rank() == 0)


def is_first_of_job() -> bool:
    """Whether this process speaks for its Slurm job, which is requeued as a whole.

    Returns:
        True for one process of the job, also where its tasks are runs of their own.

    Example:
        >>> is_first_of_job()
        True
    """
    return rank() == 0 if is_distributed() else _is_first_task()


def warn_of_unconnected_tasks(folder: Path) -> None:
    """Say that this task of a Slurm job is a run of its own, which it may not be meant to be.

    Args:
        folder: Of its checkpoints.
    """
    if is_first_rank() and not is_distributed() and not _is_first_task():
        _LOGGER.warning(
            "this is task %s of a Slurm job, and its processes are not connected: it trains and saves a run of its own "
            "in %s. Give every task a folder of its own, or call torch.distributed.init_process_group() before fit()",
            os.environ["SLURM_PROCID"],
            folder,
        )


def agreed(values: Sequence[int], device: torch.device) -> list[int]:
    """Return the largest of every value over all processes, so that they act alike.

    Args:
        values: Of this process.
        device: Of the model; where the processes can exchange tensors.

    Returns:
        The values themselves without ``torch.distributed``.

    Example:
        >>> agreed([0, 3], torch.device("cpu"))
        [0, 3]
    """
    if not is_distributed():
        return list(values)
    tensor = torch.tensor(values, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def gathered_from_ranks(value: Any) -> list[Any]:
    """Return every process's value, by rank.

    Args:
        value: Of this process.

    Returns:
        A list; of one value without ``torch.distributed``.

    Raises:
        OtherRankFailed: Another process has told by `tell_failure` that it failed before it came here.
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    for other, theirs in enumerate(values):
        if isinstance(theirs, _Failure):
            raise OtherRankFailed(f"rank {other} failed, so this one stops as well", received=theirs.text)
    return values


def tell_failure(error: Exception) -> None:
    """Let the other processes fail too where they wait for this one, in `gathered_from_ranks` or `wait_for_all_ranks`.

    Args:
        error: Why this process does not come there. Nothing is told of what another one has told.
    """
    if is_distributed() and not isinstance(error, OtherRankFailed):
        values: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, _Failure(f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Do something in every process; where it fails in one, all of them raise.

    Raises:
        OtherRankFailed: It has failed in another process.

    Example:
        >>> with failing_together():
        ...     1 + 1
        2
    """
    try:
        yield
    except Exception as error:
        tell_failure(error)
        raise
    wait_for_all_ranks()


@contextlib.contextmanager
def on_first_rank() -> Iterator[bool]:
    """Do something in the first process while the others wait; where it fails, all of them raise.

    Yields:
        Whether this process is the one.

    Example:
        >>> with on_first_rank() as is_first:
        ...     is_first
        True
    """
    with failing_together():
        yield is_first_rank()


def of_first_rank(value: Any) -> Any:
    """Return the first process's value in all of them.

    Args:
        value: Of this process.

    Example:
        >>> of_first_rank(3)
        3
    """
    return gathered_from_ranks(value)[0]


def wait_for_all_ranks() -> None:
    """Return once every process is here.

    Raises:
        OtherRankFailed: One of them has failed instead.
    """
    gathered_from_ranks(None)


def is_distributed() -> bool:
    """Whether this process is one of those of ``torch.distributed``.

    Returns:
        True also for the only one.

    Example:
        >>> is_distributed()
        False
    """
    return distributed.is_available() and distributed.is_initialized()


def _is_first_task() -> bool:
    return os.environ.get("SLURM_PROCID", "0") == "0"
