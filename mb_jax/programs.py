"""A function of one model as a JAX function of all models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from bridge.by_value import Knowable
from bridge.cost import bytes_written
from bridge.dtypes import as_jax_dtype
from bridge.keys import constant_key
from bridge.taken import Taken
from bridge.translators import Checked, translate_function
from mb_jax.outside import plain_attributes_kept, warn_of_differences
from mb_jax.rng import key_of
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.definition import Definition
from mb_torch.stacked.one_model import OneModel
from mb_torch.stacked.packing import Packing, pack
from mb_torch.stacked.parts import Plan

Arrays = list[jax.Array]
T = TypeVar("T")


class OtherValues(Exception):
    """A program was made for other values; see `bridge.by_value`."""


class ModelProgram:
    """A function of one model (of each definition), translated for arguments of one form.

    Its flat inputs are the tensors of each definition, then the tensors among the arguments; its flat outputs are the
    tensors of the result, then the new values of all tensors of each definition.

    Args:
        definitions: The definitions whose prototypes the function gets.
        body: ``body(*prototypes, *trees)``, the work of one model; returns a pytree.
        example: One model's tensors, for each definition.
        arguments: The arguments of all models.
        smooth_leaves: Gradients of so many leading leaves are compared with PyTorch's.
        translator: See `bridge.translators.translate_function`.
        verify: See there.
        tried: The leaves whose values another program for arguments of this form was made for, if there is one.

    Attributes:
        packing: The form of the result.
        checked: The translation and how it compared with PyTorch.
        num_tensors: How many tensors the definitions have together.
        num_results: How many tensors the result has.
        changed: Positions of the definitions' tensors that the function changes.
        by_value: Leaves of the arguments whose values it was made for: it must not be run with others.
        forms: Shape and dtype of each flat input of one model.
        key: Equal for programs that compute the same.
    """

    packing: Packing

    def __init__(
        self,
        definitions: Sequence[Definition],
        body: Callable[..., Any],
        example: Sequence[Sequence[Tensor]],
        arguments: Arguments,
        smooth_leaves: int,
        *,
        translator: str,
        verify: bool,
        tried: Sequence[int] | None = None,
    ) -> None:
        self._one = OneModel(definitions, body)
        self._one.refuse_backward_hooks()
        for definition in definitions:
            warn_of_differences(definition)
        self._counts = [len(own) for own in example]
        self.num_tensors = sum(self._counts)
        leaves = zip(arguments.leaves, arguments.mapped, strict=True)
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf, _ in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in arguments.leaves]
        self._arguments = arguments.with_leaves(self._constants)
        tensor_leaves = [index for index, is_tensor in enumerate(self._is_tensor) if is_tensor]
        own_leaves = [
            _of_first_model(leaf, mapped, index < smooth_leaves)
            for index, (leaf, mapped) in enumerate(zip(arguments.leaves, arguments.mapped, strict=True))
            if isinstance(leaf, Tensor)
        ]
        inputs = [*(tensor for own in example for tensor in own), *own_leaves]
        prototypes = [definition.prototype for definition in definitions]
        with plain_attributes_kept([module for prototype in prototypes for module in prototype.modules()]):
            self.checked: Checked = translate_function(
                self._flat,
                inputs,
                prototypes,
                translator=translator,
                verify=verify,
                knowable=_knowable(arguments, tensor_leaves, tried).after(self.num_tensors),
            )
        translation = self.checked.translation
        self.by_value = [tensor_leaves[position - self.num_tensors] for position in translation.known or ()]
        self._taken = [Taken(tensor) for tensor in self.checked.taken]
        self.num_results = len(translation.dtypes) - self.num_tensors
        self.forms = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        # Equal keys compute the same; what has no text is like nothing else.
        self.key: Hashable = (translation.translator, translation.text or object(), self.num_results, self.forms)
        after = translation.unchanged[self.num_results :]
        self.changed = [position for position, source in enumerate(after) if source != position]

    def _flat(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        own, first = [], 0
        for count in self._counts:
            own.append(list(tensors[first : first + count]))
            first += count
        remaining = iter(tensors[first:])
        leaves = [
            next(remaining) if is_tensor else constant
            for is_tensor, constant in zip(self._is_tensor, self._constants, strict=True)
        ]
        result, replaced = self._one.call(own, self._arguments.with_leaves(leaves).trees)
        results, self.packing = pack(result)
        after = [
            new.get(position, tensor)
            for tensors_, new in zip(own, replaced, strict=True)
            for position, tensor in enumerate(tensors_)
        ]
        return [*results, *after]

    def check_serves(self, batches: Sequence[Arguments]) -> None:
        """Raise `OtherValues` unless one program is right for batches of equal form, the first of which made it.

        Rows that were picked by looked-at numbers, the last leaf of batches that have one, are other ones each time.
        """
        for index in self.by_value:
            first, *others = [own.leaves[index] for own in batches]
            picks_rows = batches[0].trees[-1] is first
            if picks_rows or not all(torch.equal(first, other) for other in others):
                raise OtherValues

    def is_current(self) -> bool:
        """Whether the tensors that the function took from elsewhere have the values that it was translated with."""
        return all(taken.is_current() for taken in self._taken)

    def report(self) -> dict[str, Any]:
        """Which translator was used, and the largest difference from PyTorch that was seen."""
        comparison = self.checked.comparison
        return {
            "translator": self.checked.translation.translator,
            "largest_difference": None if comparison is None else comparison.largest,
            "where": None if comparison is None else comparison.where,
        }

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return self.checked.translation.draws

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the result's tensors."""
        return self.checked.translation.dtypes[: self.num_results]

    def reached(self, output: int) -> frozenset[int]:
        """Positions of the inputs that gradients flow to from a result."""
        return self.checked.translation.reached[output]

    def run_one(self, inputs: Sequence[jax.Array], key: jax.Array | None, convolution: str) -> tuple[Arrays, Arrays]:
        """Run one model.

        Returns:
            The arrays of the result, and the new values of the changed tensors.
        """
        outputs = self.checked.translation.run(inputs, key, convolution)
        return outputs[: self.num_results], [outputs[self.num_results + position] for position in self.changed]

    def bytes_written(self, convolution: str) -> int:
        """Return how many bytes one model's forward pass computes; see `bridge.cost.bytes_written`."""
        inputs = [jax.ShapeDtypeStruct(shape, as_jax_dtype(dtype)) for shape, dtype in self.forms]
        seed = step = jax.ShapeDtypeStruct((), jnp.int64)

        def run(inputs: Arrays, seed: jax.Array, step: jax.Array) -> Any:
            return self.run_one(inputs, key_of(seed, step) if self.draws else None, convolution)

        return bytes_written(run, inputs, seed, step)


_PROGRAMS_KEPT = 512

_compiled: OrderedDict[Hashable, Any] = OrderedDict()


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` returns, made once in a process for each key; the longest unused ones are forgotten.

    Batches of equal models (a selection, a copy, the next pack of a sweep) share their programs.
    """
    if key not in _compiled:
        _compiled[key] = make()
        if len(_compiled) > _PROGRAMS_KEPT:
            _compiled.popitem(last=False)
    _compiled.move_to_end(key)
    return _compiled[key]


def _of_first_model(leaf: Tensor, mapped: bool, smooth: bool) -> Tensor:
    own = (leaf[0] if mapped else leaf).detach()
    if own.is_inference():
        own = own.clone()
    return own.requires_grad_(smooth and (own.is_floating_point() or own.is_complex()))


def _knowable(arguments: Arguments, tensor_leaves: Sequence[int], tried: Sequence[int] | None) -> Knowable:
    """Which tensors among the arguments are integers of the host, for all models or for each."""
    shared: list[int] = []
    own: list[int] = []
    for position, index in enumerate(tensor_leaves):
        leaf = arguments.leaves[index]
        if leaf.dtype in (torch.int32, torch.int64) and leaf.device.type == "cpu":
            (own if arguments.mapped[index] else shared).append(position)
    before = None if tried is None else tuple(tensor_leaves.index(index) for index in tried)
    return Knowable(tuple(shared), tuple(own), before)


def over_models(
    function: Callable[..., Any], mapped: Sequence[bool], num_models: int, chunk_size: int | None
) -> Callable[..., Any]:
    """Run ``function(arrays, random)`` of one model for all models.

    Args:
        function: Takes a flat list of arrays and the model's ``(seed, step)`` pair or None.
        mapped: For each of the arrays, whether it has a leading model axis.
        num_models: How many models there are.
        chunk_size: At most so many run at a time.
    """

    def run(arrays: Sequence[jax.Array], random: Any) -> Any:
        own = [array for array, flag in zip(arrays, mapped, strict=True) if flag]

        def one(given: tuple[Any, Arrays, Any]) -> Any:
            _, own, random = given
            remaining = iter(own)
            inputs = [next(remaining) if flag else array for array, flag in zip(arrays, mapped, strict=True)]
            return function(inputs, None if random is None else key_of(*random))

        # Numbers of the models, so that there is a model axis even where no array has one.
        given = (jnp.arange(num_models), own, random)
        if chunk_size is None or chunk_size >= num_models:
            return jax.vmap(one)(given)
        return jax.lax.map(one, given, batch_size=chunk_size)

    return run


def signature(arguments: Arguments) -> Hashable:
    """What a program is specialised on: the form of its arguments, and every value that is not a tensor."""
    return (
        tuple(arguments.structures),
        tuple(
            (leaf.shape, leaf.dtype, mapped, leaf.requires_grad) if isinstance(leaf, Tensor) else constant_key(leaf)
            for leaf, mapped in zip(arguments.leaves, arguments.mapped, strict=True)
        ),
    )


def part_of(plan: Plan | None, array: jax.Array, part: int) -> jax.Array:
    """One part's share of values per model ``[num_models, ...]``."""
    if plan is None:
        return array
    first = sum(plan.sizes[:part])
    chosen = slice(first, first + plan.sizes[part])
    return array[chosen] if plan.order is None else array[plan.order.numpy()[chosen]]
