"""Settings that every test runs under: one thread, no display, fixed seeds, nothing taken from the shell."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, because it reads these once. One thread a process: the workers share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Most tests compile programs that another test has compiled already. One device thread a process, as above.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".xla_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
# A shell that starts the tests behind its back has Ctrl-C ignored, which they and their child processes would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for variable in [name for name in os.environ if name.startswith("MODELBATCH_")]:
    del os.environ[variable]

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# The same examples in every run: a failure in CI repeats on any machine.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True, max_examples=50)
hypothesis.settings.load_profile("repository")


def _process_settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradient recording": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed torch before each test, and fail a test that leaves a process-wide switch changed."""
    torch.manual_seed(0)
    before = _process_settings()
    yield
    assert _process_settings() == before


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """Dynamo's counters, from zero."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
