"""A contestant in a process of its own, told by its parent what to do next.

The parent asks one worker at a time and waits for the answer, so no two contestants ever compute at once.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import resource
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.contestants import CONTESTANTS, TOGETHER
from benchmarks.workloads import Workload

Weights = list[dict[str, npt.NDArray[Any]]]
# Generous: compilation on a busy machine takes a minute or two. It is there so that nothing hangs.
ANSWER_SECONDS = 600
M_MMAP_THRESHOLD = -3  # of malloc.h


class Session:
    """What a worker process does for its parent.

    Args:
        contestant: A key of `CONTESTANTS`.
    """

    def __init__(self, contestant: str) -> None:
        self._make = CONTESTANTS[contestant]

    def build(self, workload: Workload) -> None:
        """Make the contestant for a workload."""
        if workload.device == "cpu":
            # Read when the contestant imports JAX, which else prefers a GPU.
            os.environ["JAX_PLATFORMS"] = "cpu"
        self._contestant = self._make(workload)
        self._batches = workload.batches()
        self._steps = 0
        self._losses: list[list[float]] = []

    def run(self, steps: int) -> float:
        """Train for some steps; return the seconds until all is computed."""
        batches = [self._batches[(self._steps + k) % len(self._batches)] for k in range(steps)]
        calls = [batches[first : first + TOGETHER] for first in range(0, steps, TOGETHER)]
        contestant = self._contestant
        returned = []
        gc.collect()
        start = time.perf_counter()
        for own in calls:
            returned.append(contestant.run(own))
        contestant.wait()
        seconds = time.perf_counter() - start
        self._steps += steps
        self._losses += [losses for own in returned for losses in contestant.losses(own).tolist()]
        return seconds

    def losses(self) -> list[list[float]]:
        """Losses of every step so far, `[steps, num_models]`."""
        return self._losses

    def weights(self) -> Weights:
        """Each model's parameters."""
        return [
            {name: tensor.detach().cpu().numpy() for name, tensor in model.items()}
            for model in self._contestant.weights()
        ]

    def return_freed_memory(self) -> None:
        """From now on, large tensors go back to the system as soon as they are freed (glibc)."""
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)

    def discard(self) -> None:
        """Drop the contestant."""
        del self._contestant
        gc.collect()

    def present_memory(self) -> int:
        """Bytes that this process has in memory now."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def peak_memory(self) -> int:
        """The most bytes that this process ever had in memory."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(connection: Connection, contestant: str, threads: int) -> None:
    torch.set_num_threads(threads)
    # Read when a contestant imports JAX: as many threads as torch, and no GPU memory held back from the others.
    os.environ |= {"NPROC": str(threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # torch imports it at the first use of an optimizer or of vmap; nobody's first step is to be charged with that.
    importlib.import_module("torch._dynamo")
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache: compile times are those of a first run.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        session = Session(contestant)
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            try:
                answer, error = getattr(session, method)(*arguments), None
            except Exception:
                answer, error = None, traceback.format_exc()
            connection.send((answer, error))


class WorkerFailed(RuntimeError):
    """A worker process raised an error, died or did not answer."""


class Worker:
    """The parent's side of a worker process; use it in a `with` block.

    Args:
        contestant: A key of `CONTESTANTS`.
        threads: How many threads torch and JAX use.
    """

    def __init__(self, contestant: str, threads: int) -> None:
        self.contestant = contestant
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contestant, threads), daemon=True)
        self._process.start()
        # With our copy closed, the end of the process shows as the end of the connection.
        theirs.close()

    def build(self, workload: Workload) -> None:
        """Make the contestant for a workload."""
        self._ask("build", workload)

    def run(self, steps: int) -> float:
        """Train for some steps; return the seconds they took."""
        seconds: float = self._ask("run", steps)
        return seconds

    def losses(self) -> npt.NDArray[np.float64]:
        """Losses of every step so far, `[steps, num_models]`."""
        return np.array(self._ask("losses"))

    def weights(self) -> Weights:
        """Each model's parameters."""
        weights: Weights = self._ask("weights")
        return weights

    def return_freed_memory(self) -> None:
        """From now on, large tensors go back to the system as soon as they are freed (glibc)."""
        self._ask("return_freed_memory")

    def discard(self) -> None:
        """Drop the contestant."""
        self._ask("discard")

    def present_memory(self) -> int:
        """Bytes that the process has in memory now."""
        size: int = self._ask("present_memory")
        return size

    def peak_memory(self) -> int:
        """The most bytes that the process ever had in memory."""
        size: int = self._ask("peak_memory")
        return size

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(ANSWER_SECONDS):
                raise WorkerFailed(f"{self.contestant}: no answer to {method!r} in {ANSWER_SECONDS} seconds")
            answer, error = self._connection.recv()
        except (EOFError, OSError) as reason:
            self._process.join(10)
            code = self._process.exitcode
            raise WorkerFailed(f"{self.contestant}: died in {method!r} with exit code {code}") from reason
        if error is not None:
            raise WorkerFailed(f"{self.contestant}: {method!r} failed\n{error}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
