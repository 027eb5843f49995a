"""What the objects of a loader remember from batch to batch: random generators, and counters such as that of epochs.

They are looked for in samplers, data set and ``collate_fn`` (see `trainers.loaders.reachable`) whenever a position is
saved or restored, so that those made or replaced meanwhile are found as well. Nothing is done with single batches.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from types import GeneratorType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from trainers.errors import TrainerError
from trainers.loaders.reachable import (
    GENERATORS,
    Generator,
    cuts_of,
    held,
    own_attributes,
    reachable,
    set_own_attribute,
)

_LOGGER = logging.getLogger(__name__)

# Drawn from ahead of the batches where there are workers; first, so that what is shared counts as theirs.
_OF_SAMPLERS = ("batch_sampler", "sampler", "generator")
_PARTS = (*_OF_SAMPLERS, "dataset", "collate_fn")
# In the state of a generator of NumPy: how many others were made from it.
_SPAWNED = "n_children_spawned"


class _Counter(NamedTuple):
    owner: Any
    attribute: str
    value: Any


class Remembered:
    """The generators and counters of a loader.

    A number is taken for a counter if it has changed since the loader was given and belongs to a sampler, or has
    "epoch" in its name: an int, a float or a NumPy scalar among an object's own attributes. Counters that the copies of
    an object in worker processes keep are not kept.

    Args:
        loader: Any.
        name: What it is called in messages.

    Example:
        >>> batches = DataLoader(range(4), shuffle=True, generator=torch.Generator())
        >>> list(Remembered(batches, "train_loader").state_dict()["generators"])
        ['generator']
    """

    def __init__(self, loader: Any, name: str) -> None:
        self._loader = loader
        self._name = name
        self._at_construction = self._counted()
        self._at_start = self._all()
        self._has_warned = False
        self._has_warned_of_cuts = False
        self._warn_of_iterators()
        self._warn_of_cuts()

    def note_start(self) -> None:
        """Note what is remembered at the start of an epoch."""
        self._at_start = self._all()
        self._warn_of_cuts()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered now, and was at the start of the epoch, by path and as plain data."""
        now = self._all()
        same = [
            path
            for path, value in self._at_construction.items()
            if now.get(path) == value and self._at_start.get(path) == value
        ]
        return {
            "generators": {path: value for path, value in now.items() if path not in same},
            "generators_at_start": {path: value for path, value in self._at_start.items() if path not in same},
        }

    def restore(self, saved: Any, *, later: Any = ()) -> None:
        """Put everything to where it was.

        Args:
            saved: One of the two in `state_dict`.
            later: The other of the two: samplers may have what they made since the start of the epoch.

        Raises:
            TrainerError: A sampler has a generator that was not saved, or a generator is of another kind.
        """
        parts = self._parts()
        found = generators_in(parts)
        saved = _by_path(saved, found)
        if not _has_all_of_samplers(found, {**_by_path(later, found), **saved}):
            raise TrainerError(
                f"{self._name} at resume",
                received=f"samplers with the random generators {_of_samplers(found)}",
                expected=f"{_of_samplers(_states_only(saved))}, as in the run that is continued",
            )
        states = _states_only(saved)
        set_states(self._name, found, states)
        if not self._has_warned:
            self._has_warned = warn_of_unmatched(self._name, found, states)
        counters = _counters(parts)
        for path in saved.keys() & counters.keys():
            owner, attribute, _ = counters[path]
            set_own_attribute(owner, attribute, _number(saved[path]))

    def fits_samplers(self, saved: Any) -> bool:
        """Whether all generators that the samplers have now were saved.

        One that was saved may be missing: a sampler can make it at the start of an epoch.

        Args:
            saved: One of the two in `state_dict`.
        """
        found = generators_in(self._parts())
        return _has_all_of_samplers(found, _by_path(saved, found))

    def outside_samplers(self) -> list[str]:
        """Return the paths of generators that workers draw from, if there are any."""
        return [path for path in generators_in(self._parts()) if not _is_of_sampler(path)]

    def _all(self) -> dict[str, Any]:
        return {**states_of(generators_in(self._parts())), **self._counted()}

    def _counted(self) -> dict[str, Any]:
        return {path: _plain_number(counter.value) for path, counter in _counters(self._parts()).items()}

    def _parts(self) -> dict[str, Any]:
        if not isinstance(self._loader, DataLoader):
            return {"": self._loader}
        own = vars(self._loader)
        left_out = {"_iterator", "worker_init_fn", *_PARTS}
        rest = {key: own[key] for key in own if key not in left_out and not key.startswith("_DataLoader__")}
        return {**{part: getattr(self._loader, part) for part in _PARTS}, **rest}

    def _warn_of_cuts(self) -> None:
        if self._has_warned_of_cuts:
            return
        cuts = cuts_of(self._parts())
        if cuts:
            self._has_warned_of_cuts = True
            _LOGGER.warning(
                "%s: random generators are not looked for in %s, so a resumed run may see other samples than an "
                "uninterrupted one. Hold them as attributes of the data set, its transforms or the sampler",
                self._name,
                "; ".join(cuts[:3]),
            )

    def _warn_of_iterators(self) -> None:
        for part, value in self._parts().items():
            for path, attribute in held(part, value):
                if isinstance(attribute, GeneratorType):
                    _LOGGER.warning(
                        "%s: %s is a Python generator, whose position cannot be saved, so a resumed run will see other "
                        "samples than an uninterrupted one. Draw from a random generator, or give the data set "
                        "state_dict() and load_state_dict()",
                        self._name,
                        path,
                    )


def generators_in(parts: Mapping[str, Any]) -> dict[str, Generator]:
    """Find the random generators that objects hold, but for the global ones.

    Args:
        parts: Objects by name.

    Returns:
        Each generator once, by where it was found: ``"dataset.transform.rng"``.

    Example:
        >>> class Noisy:
        ...     def __init__(self):
        ...         self.rng = np.random.default_rng(0)
        >>> list(generators_in({"dataset": Noisy()}))
        ['dataset.rng']
    """
    own_states = (torch.default_generator, getattr(random, "_inst", None), getattr(np.random.mtrand, "_rand", None))
    return {
        path: value
        for path, value in reachable(parts)
        if isinstance(value, GENERATORS)
        and not isinstance(value, random.SystemRandom)
        and all(value is not own for own in own_states)
    }


def states_of(generators: Mapping[str, Generator]) -> dict[str, Any]:
    """Return the generators' states as plain data.

    Args:
        generators: By path.

    Returns:
        By path: a tensor, or a dict with the kind of the generator.
    """
    return {path: _state(generator) for path, generator in generators.items()}


def set_states(name: str, generators: Mapping[str, Generator], states: Mapping[str, Any]) -> None:
    """Put generators to where they were; what is not on both sides is left out.

    Args:
        name: Of the loader.
        generators: By path.
        states: From `states_of`.

    Raises:
        TrainerError: A generator is of another kind.
    """
    for path in generators.keys() & states.keys():
        try:
            _set_state(generators[path], states[path])
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise TrainerError(
                f"{name} at resume: the random generator {path}",
                received=f"a {type(generators[path]).__name__} that does not take the saved state ({error})",
                expected="a generator of the same kind as in the run that is continued",
            ) from error


def warn_of_unmatched(name: str, generators: Mapping[str, Generator], states: Mapping[str, Any]) -> bool:
    """Name the generators that are in the checkpoint only and, outside samplers, in the loader only.

    Args:
        name: Of the loader.
        generators: By path.
        states: From `states_of`.

    Returns:
        Whether there are any.
    """
    strangers = [path for path in sorted(states.keys() ^ generators.keys()) if not _is_of_sampler(path)]
    for path in strangers:
        _LOGGER.warning(
            "%s: the random generator %s is %s, so the resumed run will see other samples than an uninterrupted one. "
            "Make it in the constructor, not at its first use",
            name,
            path,
            "in the checkpoint, but not there now" if path in states else "not in the checkpoint",
        )
    missing = [path for path in states.keys() - generators.keys() if _is_of_sampler(path)]
    for path in sorted(missing):
        _LOGGER.warning(
            "%s: the random generator %s is in the checkpoint, but not there now. The resumed run has the order of an "
            "uninterrupted one if the sampler makes and seeds it in __iter__",
            name,
            path,
        )
    return bool(strangers or missing)


def _state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, internal, gauss = generator.getstate()
        return [version, list(internal), gauss]
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    bits = _bit_generator(generator)
    return {**_plain(bits.state), _SPAWNED: getattr(_seeds(bits), "n_children_spawned", None)}


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_with_arrays(state))
    else:
        _set_bits(_bit_generator(generator), _with_arrays(state))


def _bit_generator(generator: Any) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator


def _seeds(bits: Any) -> Any:
    return getattr(bits, "seed_seq", None)  # NumPy before 1.25 does not show them


def _set_bits(bits: Any, state: dict[str, Any]) -> None:
    spawned = state.pop(_SPAWNED, None)  # earlier versions have none
    seeds = _seeds(bits)
    if isinstance(seeds, np.random.SeedSequence) and spawned not in (None, seeds.n_children_spawned):
        # As when it is unpickled: there is no other way back.
        seeds = np.random.SeedSequence(**{**seeds.state, "n_children_spawned": spawned})
        bits.__setstate__((state, seeds))
    else:
        bits.state = state


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    return value


def _with_arrays(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"dtype", "values"}:
        return np.array(value["values"], dtype=value["dtype"])
    return {key: _with_arrays(entry) for key, entry in value.items()}


def _by_path(saved: Any, found: Mapping[str, Generator]) -> dict[str, Any]:
    """What was saved; earlier versions have a list, of the samplers' generators alone."""
    if isinstance(saved, Mapping):
        return dict(saved)
    return dict(zip([*_of_samplers(found), *found], saved, strict=False))


def _states_only(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Without the counters."""
    return {path: state for path, state in saved.items() if not _is_saved_number(state)}


def _is_number(value: Any) -> bool:
    """Whether it can be given back as the same type; the widest floats of NumPy cannot."""
    if isinstance(value, np.generic):
        return isinstance(value, (np.integer, np.floating)) and type(value.item()) in (int, float)
    return type(value) in (int, float)


def _plain_number(value: Any) -> Any:
    return {"number": str(value.dtype), "value": value.item()} if isinstance(value, np.generic) else value


def _is_saved_number(state: Any) -> bool:
    return isinstance(state, (int, float)) or (isinstance(state, Mapping) and state.keys() == {"number", "value"})


def _number(state: Any) -> Any:
    return np.dtype(state["number"]).type(state["value"]) if isinstance(state, Mapping) else state


def _has_all_of_samplers(found: Mapping[str, Generator], saved: Mapping[str, Any]) -> bool:
    return set(_of_samplers(found)) <= set(_states_only(saved))


def _of_samplers(paths: Mapping[str, Any]) -> list[str]:
    return [path for path in paths if _is_of_sampler(path)]


def _is_of_sampler(path: str) -> bool:
    return path.startswith(_OF_SAMPLERS)


def _counters(parts: Mapping[str, Any]) -> dict[str, _Counter]:
    found = {}
    for path, value in reachable(parts):
        is_sampler = path in _OF_SAMPLERS or isinstance(value, Sampler)
        for attribute, number in own_attributes(value).items():
            if _is_number(number) and (is_sampler or "epoch" in attribute):
                found[f"{path}.{attribute}" if path else attribute] = _Counter(value, attribute, number)
    return found
