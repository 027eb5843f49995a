"""Keeps the C library from giving memory back to the system between two training steps."""

from __future__ import annotations

from functools import cache

import torch

# glibc grows its thresholds with the largest block that was freed, up to 32 MiB.
_BLOCK_BYTES = 31 << 20


@cache
def keep_freed_memory() -> None:
    """Let the allocator of the CPU expect that large blocks come and go; once for the process.

    At the end of a step glibc would return the memory of all activations to the system, and the next step would fetch
    it back page by page: a fifth of the time of a step of 64 small models. A large block that is freed raises the
    thresholds (man 3 mallopt, M_TRIM_THRESHOLD); this one is never written to, so that it takes no memory. Then up to
    62 MiB of freed memory stay with the process. Other allocators are not concerned.
    """
    # Freed at once, because nothing holds it: that is what raises the thresholds.
    torch.empty(_BLOCK_BYTES, dtype=torch.uint8)
