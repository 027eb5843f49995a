"""Translations that are made for the values of some inputs: which inputs, and one program for each set of values."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor, nn

from bridge.arrays import to_numpy
from bridge.known import with_known
from bridge.trace import LooksAtValues
from bridge.translation import TensorFunction, Translation, Translator
from mb_torch.errors import Unsupported

logger = logging.getLogger("modelbatch.jax")

Entry = TypeVar("Entry")


class Knowable(NamedTuple):
    """Inputs whose values a translation may be made for.

    Attributes:
        shared: Positions of integers that are the same for all models.
        own: Positions of integers that every model has its own of; no program can be made for their values.
        tried: What an earlier translation of the same function was made for, to be tried first; None if there is none.
    """

    shared: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    tried: tuple[int, ...] | None = None

    def after(self, count: int) -> Knowable:
        """The same, after so many other inputs.

        Example:
            >>> Knowable(shared=(0, 2), tried=(2,)).after(10)
            Knowable(shared=(10, 12), own=(), tried=(12,))
        """
        shared, own = (tuple(place + count for place in places) for places in (self.shared, self.own))
        return Knowable(shared, own, None if self.tried is None else tuple(place + count for place in self.tried))


NOTHING = Knowable()


def translate_by_value(
    translator: Translator,
    function: TensorFunction,
    inputs: Sequence[Tensor],
    modules: Sequence[nn.Module],
    knowable: Knowable,
) -> Translation:
    """Translate a function, for the values of as few inputs as will do: none, one, or all that turn out to be needed.

    Raises:
        Unsupported: The function cannot be translated, or looks at values of other inputs or of what it computes.
    """
    other: list[Unsupported] = []

    def attempt(places: tuple[int, ...]) -> Translation | None:
        try:
            made = translator.translate(with_known(function, inputs, places), inputs, modules)
        except Unsupported as error:
            if not isinstance(error, LooksAtValues):
                other.append(error)
            return None
        return replace(made, known=places)

    if knowable.tried and (again := attempt(knowable.tried)) is not None:
        return again
    try:
        return translator.translate(function, inputs, modules)
    except LooksAtValues as error:
        for places in dict.fromkeys([(), *((place,) for place in knowable.shared), knowable.shared]):
            if (found := attempt(places)) is not None:
                return _with_fewer(found, attempt)
        if other:
            raise other[-1] from error
        if knowable.own and attempt((*knowable.shared, *knowable.own)) is not None:
            raise LooksAtValues(
                f"{error.what}; it follows from integers that every model has its own of",
                fix="Share lengths, and other integers that decide shapes or branches, between all models.",
            ) from error
        raise


def _with_fewer(found: Translation, attempt: Callable[[tuple[int, ...]], Translation | None]) -> Translation:
    """Leave out what need not be known."""
    known = found.known or ()
    # Of one or no input there is nothing to leave out.
    for place in known if len(known) > 1 else ():
        found = attempt(tuple(other for other in found.known or () if other != place)) or found
    return found


_MANY = 32
_MANY_SETS = (
    "%d sets of lengths (or other integers whose values decide shapes) so far, each of which compiles a program: "
    "bucket the lengths, so that few sets come again and again"
)
_MANY_FORMS = (
    "%d programs so far: each shape of a batch compiles one, and each value that a model or loss reads from outside (a "
    "global, a closure, an attribute); give the loss numbers that change as loss_args= or shared_args="
)
_KEPT = 512


class ByValue(Generic[Entry]):
    """Programs by the form of their arguments, and by the values of those arguments that they were made for.

    The longest unused programs are forgotten; after 32 sets of values a warning says once what compiles so often.

    Example:
        >>> import torch
        >>> programs = ByValue()
        >>> two, three = [torch.ones(4), torch.tensor(2)], [torch.ones(4), torch.tensor(3)]
        >>> programs.put("form", [1], two, "the program for 2")
        >>> programs.get("form", two), programs.get("form", three), programs.places("form")
        ('the program for 2', None, (1,))
    """

    def __init__(self) -> None:
        self._places: dict[Hashable, tuple[int, ...]] = {}
        self._entries: OrderedDict[tuple[Hashable, tuple[bytes, ...]], Entry] = OrderedDict()
        # Without and with values.
        self._num_made = [0, 0]

    def places(self, form: Hashable) -> tuple[int, ...] | None:
        """Which arguments' values programs of this form are made for; None before there is one."""
        return self._places.get(form)

    def get(self, form: Hashable, arguments: Sequence[Any]) -> Entry | None:
        """The program for arguments of this form with these values; None if there is none."""
        places = self._places.get(form)
        if places is None:
            return None
        key = form, _values(arguments, places)
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, form: Hashable, places: Sequence[int], arguments: Sequence[Any], entry: Entry) -> None:
        """Keep a program.

        Args:
            form: The form of its arguments.
            places: Which arguments' values it was made for. Programs of this form are found by these and all earlier
                ones: values may decide at which others a function looks.
            arguments: All arguments, tensors or arrays at the places.
            entry: The program.
        """
        before = self._places.get(form, ())
        every = tuple(sorted({*before, *places}))
        if every != before:
            for key in [key for key in self._entries if key[0] == form]:
                del self._entries[key]
        self._places[form] = every
        self._entries[form, _values(arguments, every)] = entry
        if len(self._entries) > _KEPT:
            self._entries.popitem(last=False)
        self._num_made[bool(every)] += 1
        if self._num_made[bool(every)] == _MANY:
            logger.warning(_MANY_SETS if every else _MANY_FORMS, _MANY)

    def entries(self) -> Iterator[Entry]:
        """All programs."""
        return iter(self._entries.values())


def _values(arguments: Sequence[Any], places: Sequence[int]) -> tuple[bytes, ...]:
    # Shapes and dtypes are part of the form.
    return tuple([_bytes(arguments[place]) for place in places])


def _bytes(argument: Any) -> bytes:
    return (to_numpy(argument) if isinstance(argument, Tensor) else np.asarray(argument)).tobytes()
