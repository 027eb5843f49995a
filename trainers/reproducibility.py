"""Seeds of the random generators, and algorithms that give the same result every time."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_LOGGER = logging.getLogger(__name__)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices).

    Call it before models are made; a trainer with ``seed`` in its config does so only when a run begins.

    Args:
        seed: 0 to 2^32 - 1.

    Example:
        >>> seed_everything(3)
        >>> first = torch.rand(())
        >>> seed_everything(3)
        >>> bool(first == torch.rand(()))
        True
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def algorithms(*, deterministic: bool, benchmark: bool) -> Iterator[None]:
    """Choose among torch's algorithms for a while.

    Args:
        deterministic: Whether only those that give the same result every time are used; torch warns of operations
            that have none. See https://docs.pytorch.org/docs/stable/notes/randomness.html.
        benchmark: Whether cuDNN tries out which algorithm is the fastest for every new shape. Not with
            ``deterministic``, because what is the fastest may differ from run to run: a warning says so.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled, benchmarked = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    if deterministic:
        # What cuBLAS asks for; it is read when the library starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Meant for finding bugs, at the price of writing all memory twice.
        memory.fill_uninitialized_memory = False
        _set_benchmark(False)
        if benchmark:
            _LOGGER.warning("benchmark has no effect with deterministic: the fastest algorithm may differ between runs")
    elif benchmark:
        _set_benchmark(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        _set_benchmark(benchmarked)


def _set_benchmark(value: bool) -> None:
    # Not what it is already: a process may have these flags locked (`torch.backends.disable_global_flags`).
    if torch.backends.cudnn.benchmark != value:
        torch.backends.cudnn.benchmark = value
