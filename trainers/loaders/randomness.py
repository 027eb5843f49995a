"""The randomness of loaders: samplers that are replayed, generators in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainers.loaders.remembered import generators_in, set_states, states_of, warn_of_unmatched
from trainers.states import RNGState, capture_rng_state, restore_rng_state, rng_to_dict


class ReplayedSampler:
    """A sampler whose state is how far it got; it gets there again as soon as the state is loaded."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def __iter__(self) -> ReplayedIterator:
        return ReplayedIterator(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class ReplayedIterator:
    """One pass over a sampler; see `ReplayedSampler`."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._iterator: Iterator[Any] | None = None
        self._drawn = 0

    def __iter__(self) -> ReplayedIterator:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            # Not before it is needed: a loader that is brought to a state asks twice, and some samplers draw at that.
            self._iterator = iter(self._sampler)
        value = next(self._iterator)
        self._drawn += 1
        return value

    def state_dict(self) -> dict[str, int]:
        """Return how far it got."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Get as far as a state."""
        # At once, while the generators stand at the start of the epoch.
        for _ in range(state["drawn"]):
            next(self)


class WithWorkerRandomness:
    """A data set whose state holds the random generators of the worker process it is in.

    These are the global ones, and those that the data set and ``collate_fn`` hold there. Everything else is passed on,
    so that a ``worker_init_fn`` finds and changes the data set's own attributes.

    Args:
        dataset: The data set.
        collate_fn: Of the same loader.
        name: Of the loader, for messages.
    """

    def __init__(self, dataset: Any, collate_fn: Any = None, name: str = "loader") -> None:
        object.__setattr__(self, "_dataset", dataset)
        # In one attribute: the data set's own attributes of that name would be hidden.
        object.__setattr__(self, "_of_loader", (collate_fn, name))

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataset", "_of_loader"):
            # A copy that is being unpickled has nothing to pass it on to yet.
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __getstate__(self) -> Any:
        return self._dataset, *self._of_loader

    def __setstate__(self, state: Any) -> None:
        WithWorkerRandomness.__init__(self, *state)

    def state_dict(self) -> dict[str, Any]:
        """Return the data set's own state and that of the generators."""
        own = self._dataset.state_dict() if hasattr(self._dataset, "state_dict") else None
        return {
            "dataset": own,
            "rng": rng_to_dict(capture_rng_state()),
            "generators": states_of(generators_in(self._parts())),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])
        restore_rng_state(RNGState(**state["rng"]))
        # Checkpoints of earlier versions have none.
        found, states = generators_in(self._parts()), state.get("generators")
        if states is not None:
            name = f"{self._of_loader[1]}, in a worker process"
            set_states(name, found, states)
            warn_of_unmatched(name, found, states)

    def _parts(self) -> dict[str, Any]:
        return {"dataset": self._dataset, "collate_fn": self._of_loader[0]}
