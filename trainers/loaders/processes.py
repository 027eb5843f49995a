"""Worker processes of loaders: started so that they cannot hang, and kept out of reach of the trainer's signals.

On Linux a worker begins as a copy of the process ("fork"). A copy lacks the process's threads, but not the locks that
they held: where a backend has threads of its own, the copy may wait forever. Workers are then made by a process
without threads ("forkserver"), and what they need is sent to them.

Schedulers send their signals to all processes of a job. They are for the trainer, which saves and stops at the next
boundary; until then it needs its workers.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from mb_torch import ModelBatch
from trainers.errors import TrainerError

_LOGGER = logging.getLogger(__name__)
# What a worker needs, imported once by the process that makes them instead of in every worker of every epoch.
_PRELOADED = ["__main__", "torchdata.stateful_dataloader", "trainers.loaders.processes"]
# Who has sent a signal can be told on Linux, not on macOS.
_KNOWS_SENDERS = hasattr(signal, "sigwaitinfo")
# How often a worker asks whether its owner is there.
_SECONDS = 5.0
# Backends with threads that have run in this process; their threads stay.
_threaded_backends: set[str] = set()


def can_fork(model: nn.Module) -> bool:
    """Whether this process may be forked while a model trains, and note it for good if not.

    Args:
        model: A module or a `ModelBatch`.

    Returns:
        False from the first model on whose backend has threads that a forked process would lack, and where the
        caller's own code has run JAX.
    """
    if isinstance(model, ModelBatch) and not model.backend.capabilities.survives_fork:
        _threaded_backends.add(model.backend.name)
    if _has_run_jax():
        _threaded_backends.add("jax")
    return not _threaded_backends


def safe_context(loader: DataLoader[Any], name: str) -> Any:
    """Return how a loader is to start its workers in a process that cannot be forked.

    Args:
        loader: Any.
        name: What it is called in messages.

    Returns:
        The loader's own ``multiprocessing_context``, or a better one where it has none. Where there is none that
        works, a warning is logged.

    Raises:
        TrainerError: The worker itself has come here, because it runs the whole script.
    """
    given = loader.multiprocessing_context
    if not loader.num_workers or _start_method(given) != "fork":
        return given
    backends = ", ".join(sorted(_threaded_backends))
    obstacle = "it was given multiprocessing_context='fork'" if given is not None else _obstacle(loader)
    if obstacle is not None:
        _LOGGER.warning(
            "%s: its %d worker processes are forked from a process in which backend %s has threads, so they may hang, "
            "because %s. Use num_workers=0, or multiprocessing_context='forkserver' with a data set and functions "
            "that can be pickled",
            name,
            loader.num_workers,
            backends,
            obstacle,
        )
        return given
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise TrainerError(
            f"{name}: a worker process that is being started runs the whole script, which would train once more",
            fix='Keep the script\'s body under `if __name__ == "__main__":`, or use num_workers=0.',
        )
    _LOGGER.info(
        "%s: its worker processes are started by 'forkserver', because backend %s has threads, which a forked process "
        "would lack",
        name,
        backends,
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


class WorkerStart:
    """The ``worker_init_fn`` of a worker that ends with the process that started it, or by its SIGTERM and no other.

    Args:
        own: The loader's own function; None for none.

    Attributes:
        signals: That the worker never sees; set by `signals_kept`.
    """

    def __init__(self, own: Callable[[int], Any] | None) -> None:
        self.own = own
        self.signals: set[int] = set()
        self._owner = os.getpid()

    def __call__(self, worker: int) -> None:
        """Begin a worker process.

        Args:
            worker: Its number.
        """
        # Again: one that is no copy of its owner has not inherited this.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        if _KNOWS_SENDERS:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=self._end_in_time, name="owner", daemon=True).start()
        if self.own is not None:
            self.own(worker)

    def _end_in_time(self) -> None:
        owner = multiprocessing.parent_process()
        # torch asks after the parent, which for one that is no copy is not its owner.
        while owner is None or owner.is_alive():
            if not _KNOWS_SENDERS:
                time.sleep(_SECONDS)
                continue
            received = signal.sigtimedwait([signal.SIGTERM], _SECONDS)
            if received is not None and received.si_pid == self._owner:
                break
        os._exit(0)


@contextlib.contextmanager
def signals_kept(start: WorkerStart, context: Any) -> Iterator[None]:
    """Workers that are started within the block never see the signals that this process handles.

    Args:
        start: How the workers begin.
        context: The loader's ``multiprocessing_context``.
    """
    left = {signal.SIGCHLD} if _KNOWS_SENDERS else {signal.SIGCHLD, signal.SIGTERM}
    handled = {number for number in signal.valid_signals() - left if callable(signal.getsignal(number))}
    start.signals = {int(number) for number in handled}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    try:
        if _start_method(context) != "fork":
            # Started on the way to the first worker, it would unblock SIGTERM before the workers' maker is made.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        yield
    finally:
        # What has come meanwhile is handled now.
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_run_jax() -> bool:
    """Whether JAX has threads in this process, whoever called it."""
    if "jax" not in sys.modules:
        return False
    has_backends = getattr(sys.modules.get("jax._src.xla_bridge"), "backends_are_initialized", None)
    # No public name tells. A release without this one may have run.
    return has_backends is None or has_backends()


def _reduce_generator(generator: torch.Generator) -> tuple[Any, ...]:
    """Send a generator's state by value.

    PyTorch sends it as a tensor in shared memory that is gone before the process begins, which then ends with "unable
    to resize file" (seen with PyTorch 2.13).
    """
    return _generator, (str(generator.device), generator.get_state().numpy().tobytes())


def _generator(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


# From the import on, as torch's own ways to send tensors.
ForkingPickler.register(torch.Generator, _reduce_generator)


def _start_method(context: Any) -> str:
    if context is not None:
        return context.get_start_method()
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


class _Probe(pickle.Pickler):
    """Finds out whether something can be pickled, without the tensors and arrays in it: they can, and may be large."""

    def persistent_id(self, value: Any) -> str | None:
        is_plain = isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and not value.dtype.hasobject)
        return "data" if is_plain else None


def _obstacle(loader: DataLoader[Any]) -> str | None:
    """Why a loader's workers cannot be started but by forking; None if they can."""
    if inspect.isgeneratorfunction(type(loader).__iter__):
        return f"the class {type(loader).__name__} starts them itself"
    parts = {"data set": loader.dataset, "collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn}
    main = sys.modules["__main__"]
    is_importable = getattr(main, "__spec__", None) is not None or getattr(main, "__file__", None) is not None
    for what, part in parts.items():
        stream = io.BytesIO()
        try:
            _Probe(stream).dump(part)
        except Exception as error:  # objects may raise anything when they are pickled
            return f"its {what} cannot be pickled ({error})"
        if not is_importable and b"__main__" in stream.getvalue():
            return f"its {what} is defined in an interactive session, from where no other process can import it"
    return None
