"""Loaders that go on in the middle of an epoch with exactly the samples that were left, in the same order.

How, by kind of loader:

| loader | means |
|---|---|
| list or tuple of batches | by index |
| ``DataLoader``, ``StatefulDataLoader`` | rebuilt as torchdata's ``StatefulDataLoader`` from its own arguments |
| one of an ``IterableDataset`` without a state, a subclass of these, any other iterable | drawn again and skipped |

The order of the rest of an epoch follows from the random generators at the epoch's start. So they are put back to that
point, the loader is brought to its place, and the caller puts the generators to where they were at the save. Samplers
that draw one seed or one permutation per epoch, as torch's do, come out exactly. A sampler that draws from the global
generators at every index, between the draws of the model, needs a generator of its own.

Generators that the samplers, the data set and ``collate_fn`` hold, torch's, numpy's and Python's, are found and put
back as well, in worker processes too; so are counters of epochs, those of this process
(see `trainers.loaders.remembered`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, IterableDataset

from mb_torch import MissingPackage
from trainers.errors import TrainerError
from trainers.loaders.processes import WorkerStart, safe_context, signals_kept
from trainers.loaders.randomness import ReplayedSampler, WithWorkerRandomness
from trainers.loaders.remembered import Remembered
from trainers.states import RNGState, restore_rng_state

_LOGGER = logging.getLogger(__name__)


# With a state for every batch, small batches take a third longer.
_BATCHES_PER_SNAPSHOT = 32


class ResumableLoader(Protocol):
    """A loader whose position within an epoch can be saved."""

    def __len__(self) -> int:
        """Return how many batches an epoch has; raises TypeError where that is unknown."""

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers whose order depends on the epoch, as that of `DistributedSampler`, which one comes.

        Args:
            epoch: From 0; said before the epoch is started or resumed.
        """

    def start(self) -> Iterator[Any]:
        """Begin an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain data."""

    def resume(self, state: Mapping[str, Any], start_rng: RNGState | None, batch_idx: int) -> Iterator[Any]:
        """Go on in the middle of an epoch; leaves the global generators anywhere.

        Args:
            state: From `state_dict`.
            start_rng: The global generators at the epoch's start; None if they were not saved.
            batch_idx: The next batch.
        """

    def restore_generators(self, state: Mapping[str, Any]) -> None:
        """Put the loader's own generators and its data set's state to where they were at a save between epochs."""

    def close(self) -> None:
        """Let worker processes go at the end of a run; the position can still be asked for."""


def make_resumable(loader: Any, name: str, *, can_fork: bool = True) -> ResumableLoader:
    """Wrap a loader by its kind; see the module's table.

    Args:
        loader: Of batches; it can be iterated again and again.
        name: What the loader is called in errors.
        can_fork: Whether worker processes may be copies of this process. If not, they are started in another way
            where the loader does not say how; see `trainers.loaders.processes`.

    Returns:
        A loader that can be resumed.

    Raises:
        TrainerError: It can be iterated once only, or not at all, or has no batch.
        MissingPackage: A ``DataLoader``, but torchdata is not installed.

    Example:
        >>> loader = make_resumable([1, 2, 3], "train_loader")
        >>> list(loader.resume(loader.state_dict(), None, 1))
        [2, 3]
    """
    # Some have no length.
    with contextlib.suppress(TypeError, NotImplementedError):
        if len(loader) == 0:
            raise TrainerError(
                name,
                received="a loader without batches",
                expected="at least one batch",
                fix="drop_last=True leaves out a batch that is not full." if getattr(loader, "drop_last", 0) else None,
            )
    if isinstance(loader, (list, tuple)):
        return _ListLoader(loader, name)
    if isinstance(loader, DataLoader):
        stateful_class = _stateful_class()
        context = loader.multiprocessing_context if can_fork else safe_context(loader, name)
        stateless_stream = isinstance(loader.dataset, IterableDataset) and not hasattr(loader.dataset, "state_dict")
        if type(loader) in (DataLoader, stateful_class) and not stateless_stream:
            return _StatefulLoader(loader, stateful_class, context, name)
        return _SkippingLoader(loader, name, context)
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise TrainerError(
            name,
            received=f"a {type(loader).__name__}"
            + (" (which ends after one epoch)" if isinstance(loader, Iterator) else ""),
            expected="a DataLoader, a list of batches, or an iterable that can be iterated again",
            fix="Wrap it in a DataLoader." if isinstance(loader, Dataset) else None,
        )
    return _SkippingLoader(loader, name)


class _ListLoader:
    """Batches in memory."""

    def __init__(self, batches: Sequence[Any], name: str) -> None:
        self._batches = batches
        self._name = name

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """A list has one order."""

    def start(self) -> Iterator[Any]:
        return iter(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "list", "length": len(self._batches)}

    def resume(self, state: Mapping[str, Any], start_rng: RNGState | None, batch_idx: int) -> Iterator[Any]:
        _check_kind(self._name, state, "list")
        if state["length"] != len(self._batches):
            raise TrainerError(
                f"{self._name} at resume", received=f"{len(self._batches)} batches", expected=f"{state['length']}"
            )
        return itertools.islice(self._batches, batch_idx, None)

    def restore_generators(self, state: Mapping[str, Any]) -> None:
        """A list has none."""

    def close(self) -> None:
        """A list has no workers."""


class _WithMemory:
    """What loaders have in common whose objects may remember something."""

    def __init__(self, loader: Any, name: str) -> None:
        self._name = name
        self._remembered = Remembered(loader, name)
        self._samplers_by_epoch = _samplers_by_epoch(loader)

    def set_epoch(self, epoch: int) -> None:
        for sampler in self._samplers_by_epoch:
            sampler.set_epoch(epoch)


class _SkippingLoader(_WithMemory):
    """Anything iterable: what had been used is drawn again."""

    def __init__(self, loader: Any, name: str, context: Any = None) -> None:
        super().__init__(loader, name)
        self._loader = loader
        self._context = context

    def __len__(self) -> int:
        return len(self._loader)

    def start(self) -> Iterator[Any]:
        self._remembered.note_start()
        if not isinstance(self._loader, DataLoader) or not self._loader.num_workers:
            return iter(self._loader)
        begin = WorkerStart(self._loader.worker_init_fn)
        with signals_kept(begin, self._context), _changed(self._loader, self._context, begin):
            return iter(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "skipping",
            "batches_of": _batches_of(self._loader),
            **self._remembered.state_dict(),
        }

    def resume(self, state: Mapping[str, Any], start_rng: RNGState | None, batch_idx: int) -> Iterator[Any]:
        _check_kind(self._name, state, "skipping")
        _check_batches(self._name, state, self._loader)
        self._remembered.restore(state["generators_at_start"], later=state["generators"])
        if start_rng is not None:
            restore_rng_state(start_rng)
        iterator = self.start()
        skipped = sum(1 for _ in itertools.islice(iterator, batch_idx))
        if skipped < batch_idx:
            raise TrainerError(
                f"{self._name} at resume", received=f"{skipped} batches", expected=f"at least {batch_idx}"
            )
        self._remembered.restore(state["generators"])
        return iterator

    def restore_generators(self, state: Mapping[str, Any]) -> None:
        if _is_same_loader(self._name, state, "skipping", self._remembered):
            self._remembered.restore(state["generators"])

    def close(self) -> None:
        """The workers go with the iterator, which the loop alone holds."""


class _StatefulLoader(_WithMemory):
    """A ``DataLoader`` rebuilt as a ``StatefulDataLoader``."""

    def __init__(self, loader: DataLoader[Any], stateful_class: Any, context: Any, name: str) -> None:
        super().__init__(loader, name)
        self._given = loader
        self._num_workers = loader.num_workers
        self._dataset: Any = loader.dataset
        self._has_state = hasattr(loader.dataset, "state_dict") and hasattr(loader.dataset, "load_state_dict")
        self._worker_start = WorkerStart(loader.worker_init_fn)
        self._loader = _rebuilt(
            loader,
            stateful_class,
            name,
            multiprocessing_context=context,
            worker_init_fn=self._worker_start if loader.num_workers else loader.worker_init_fn,
        )
        if loader.num_workers and isinstance(loader.dataset, IterableDataset):
            self._warn_of_workers()
        self._is_running = False
        self._last_state: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def start(self) -> Iterator[Any]:
        self._remembered.note_start()
        quiet = signals_kept(self._worker_start, self._loader.multiprocessing_context)
        with quiet if self._num_workers else contextlib.nullcontext():
            batches = iter(self._loader)
        self._is_running = True
        return batches

    def state_dict(self) -> dict[str, Any]:
        if self._last_state is not None:
            return self._last_state
        return {
            "kind": "stateful",
            "num_workers": self._num_workers,
            "batches_of": _batches_of(self._given),
            # Asked before its first epoch, the loader would start one.
            "loader": self._loader.state_dict() if self._is_running else None,
            # In workers a data set's state begins anew with every epoch.
            "dataset": None if self._num_workers or not self._has_state else self._dataset.state_dict(),
            **self._remembered.state_dict(),
        }

    def resume(self, state: Mapping[str, Any], start_rng: RNGState | None, batch_idx: int) -> Iterator[Any]:
        _check_kind(self._name, state, "stateful")
        if state["num_workers"] != self._num_workers:
            raise TrainerError(
                f"{self._name} at resume in the middle of an epoch",
                received=f"num_workers={self._num_workers}",
                expected=f"num_workers={state['num_workers']}, as in the run that is continued",
                fix="Change the number of workers between epochs only.",
            )
        _check_batches(self._name, state, self._given)
        self._remembered.restore(state["generators_at_start"], later=state["generators"])
        if start_rng is not None:
            restore_rng_state(start_rng)
        self._loader.load_state_dict(state["loader"])
        batches = self.start()
        self._remembered.restore(state["generators"])
        return batches

    def restore_generators(self, state: Mapping[str, Any]) -> None:
        if not _is_same_loader(self._name, state, "stateful", self._remembered):
            return
        self._remembered.restore(state["generators"])
        if state["dataset"] is not None and self._has_state:
            self._dataset.load_state_dict(state["dataset"])

    def _warn_of_workers(self) -> None:
        """The state of a stream is its own affair; that of a function is nobody's."""
        unsaved = [path for path in self._remembered.outside_samplers() if not path.startswith("dataset")]
        if unsaved:
            _LOGGER.warning(
                "%s: the random generators %s are drawn from in worker processes, where their states cannot be saved, "
                "so a run that is resumed within an epoch will see other samples than an uninterrupted one. Keep them "
                "in the data set and its state_dict(), or use num_workers=0",
                self._name,
                unsaved,
            )

    def close(self) -> None:
        self._last_state = self.state_dict()
        # Drops the loader's iterator. Left to the garbage collector, its workers would be joined at any odd moment.
        self._loader.load_state_dict({})


@contextlib.contextmanager
def _changed(loader: DataLoader[Any], context: Any, begin: WorkerStart) -> Iterator[None]:
    """Let a loader that is not ours start its workers in our way, and leave it as it was."""
    before = loader.multiprocessing_context, loader.worker_init_fn
    loader.multiprocessing_context, loader.worker_init_fn = context, begin
    try:
        yield
    finally:
        loader.multiprocessing_context, loader.worker_init_fn = before


def _rebuilt(loader: DataLoader[Any], stateful_class: Any, name: str, **changed: Any) -> Any:
    """The same loader with a state; without persistent workers, which would keep the state of an earlier epoch."""
    # torchdata 0.11 calls a function that torch deprecated later.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
        return _stateful(loader, stateful_class, name, changed)


def _stateful(loader: DataLoader[Any], stateful_class: Any, name: str, changed: Mapping[str, Any]) -> Any:
    arguments: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "generator": loader.generator,
        "in_order": loader.in_order,
        **changed,
    }
    if loader.num_workers:
        arguments["prefetch_factor"] = loader.prefetch_factor
        # A worker's state is taken and sent now and then; what lies between is loaded again at a resume.
        arguments["snapshot_every_n_steps"] = _BATCHES_PER_SNAPSHOT
    if isinstance(loader.dataset, IterableDataset):
        return stateful_class(loader.dataset, loader.batch_size, drop_last=loader.drop_last, **arguments)
    dataset: Any = loader.dataset
    if loader.num_workers:
        dataset = WithWorkerRandomness(dataset, loader.collate_fn, name)
    if loader.batch_sampler is not None:
        return stateful_class(dataset, batch_sampler=ReplayedSampler(loader.batch_sampler), **arguments)
    return stateful_class(dataset, batch_size=None, sampler=ReplayedSampler(loader.sampler), **arguments)


def _stateful_class() -> Any:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise MissingPackage(
            "a DataLoader is resumed by torchdata, which is not installed",
            fix="pip install 'modelbatch-hybrid[train]', or give the batches as a list.",
        ) from error
    return StatefulDataLoader


def _check_kind(name: str, state: Mapping[str, Any], kind: str) -> None:
    if state["kind"] != kind:
        raise TrainerError(
            f"{name} at resume in the middle of an epoch",
            received=f"a loader of kind {kind!r}",
            expected=f"kind {state['kind']!r}, as in the run that is continued",
        )


def _batches_of(loader: Any) -> dict[str, Any] | None:
    """What decides which samples a batch has; None for a loader of which that is not known."""
    if not isinstance(loader, DataLoader):
        return None
    # A batch sampler that was given says it in place of the loader.
    source = loader.batch_sampler if loader.batch_size is None else loader
    size, drops = getattr(source, "batch_size", None), getattr(source, "drop_last", None)
    facts = {
        "batch_size": size if isinstance(size, int) else None,
        "drop_last": drops if isinstance(drops, bool) else None,
        "samples": None,
    }
    # The length of a data set with a state may be part of that state.
    if not hasattr(loader.dataset, "load_state_dict"):
        with contextlib.suppress(TypeError, NotImplementedError):
            facts["samples"] = len(loader.dataset)  # type: ignore[arg-type]
    return facts


def _check_batches(name: str, state: Mapping[str, Any], loader: Any) -> None:
    """Refuse other batches in the middle of an epoch: some of its samples would be left out, or come again."""
    now, before = _batches_of(loader), state.get("batches_of")
    # Checkpoints of earlier versions do not say it.
    if now is None or before is None:
        return
    changed = [key for key in before if before[key] != now[key]]
    if changed:
        raise TrainerError(
            f"{name} at resume in the middle of an epoch",
            received=", ".join(f"{key}={now[key]}" for key in changed),
            expected=", ".join(f"{key}={before[key]}" for key in changed) + ", as in the run that is continued",
            fix="Change the batches and the data set between epochs only.",
        )


def _samplers_by_epoch(loader: Any) -> list[Any]:
    """The samplers of a loader that want to know the epoch, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(sampler): sampler for sampler in samplers if hasattr(sampler, "set_epoch")}.values())


def _is_same_loader(name: str, state: Mapping[str, Any], kind: str, remembered: Remembered) -> bool:
    """Whether a state fits; between epochs another loader may take over, with an order of its own."""
    is_same = state["kind"] == kind and remembered.fits_samplers(state["generators"])
    if not is_same:
        _LOGGER.warning("%s is another loader than before: its order is not that of an uninterrupted run", name)
    return is_same
