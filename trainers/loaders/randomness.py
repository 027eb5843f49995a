"""The randomness of loaders: generators of their own, samplers that are replayed, generators in worker processes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trainers.errors import TrainerError
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

    Everything else is passed on, so that a ``worker_init_fn`` finds and changes the data set's own attributes.
    """

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":
            # A copy that is being unpickled has nothing to pass it on to yet.
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __getstate__(self) -> Any:
        return self._dataset

    def __setstate__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

    def state_dict(self) -> dict[str, Any]:
        """Return the data set's own state and that of the generators."""
        own = self._dataset.state_dict() if hasattr(self._dataset, "state_dict") else None
        return {"dataset": own, "rng": rng_to_dict(capture_rng_state())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])
        restore_rng_state(RNGState(**state["rng"]))


Generator = torch.Generator | random.Random


def generators_of(loader: Any) -> list[Generator]:
    """The generators that a loader and its samplers draw from, each once."""
    holders = [loader]
    for name in ("batch_sampler", "sampler"):
        holders.extend(getattr(holder, name, None) for holder in list(holders))
    found: dict[int, Generator] = {}
    for holder in holders:
        for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
            if isinstance(value, (torch.Generator, random.Random)):
                found[id(value)] = value
    return list(found.values())


def generator_states(generators: Sequence[Generator]) -> list[Any]:
    """Return the generators' states as plain data."""
    return [
        generator.get_state() if isinstance(generator, torch.Generator) else _as_lists(generator.getstate())
        for generator in generators
    ]


def _as_lists(state: tuple[Any, ...]) -> list[Any]:
    version, internal, gauss = state
    return [version, list(internal), gauss]


def set_generators(name: str, generators: Sequence[Generator], states: Sequence[Any]) -> None:
    """Put generators to where they were.

    Args:
        name: Of the loader, for errors.
        generators: Of the loader.
        states: From `generator_states`.

    Raises:
        TrainerError: Another number of generators.
    """
    if len(generators) != len(states):
        raise TrainerError(
            f"{name} at resume",
            received=f"a loader with {len(generators)} random generators of its own",
            expected=f"{len(states)}, as in the run that is continued",
        )
    for generator, state in zip(generators, states, strict=True):
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        else:
            generator.setstate((state[0], tuple(state[1]), state[2]))
