"""Keeps the C library from giving memory back to the system between two training steps."""

from __future__ import annotations

import ctypes
import os
from functools import cache

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


@cache
def keep_freed_memory() -> None:
    """Let the allocator of the CPU keep up to 1 GiB of freed memory for the next step; once for the process.

    By default glibc returns blocks of 32 MiB and more to the system when they are freed, and smaller ones once enough
    of them lie free: at the end of every step the memory of all activations, which the next step fetches back page by
    page. That is a fifth of the time of a step of 64 small models, and half of that of 1024.

    Nothing happens where the user has chosen thresholds (``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` in
    the environment) or where the C library is another one; see man 3 mallopt.

    Example:
        >>> keep_freed_memory()
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
