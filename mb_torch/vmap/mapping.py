"""Runs one function of one model for every model of a batch: at once, directly for a single one, or one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mb_torch.errors import InvalidInput, ModelBatchError, Unsupported
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.one_model import OneModel, Trace
from mb_torch.stacked.packing import pack
from mb_torch.vmap.autocast import honoured_autocast
from mb_torch.vmap.definition import BatchableDefinition
from mb_torch.vmap.linear import stacked_linear
from mb_torch.vmap.rng import seeded

T = TypeVar("T")


class ModelMap(OneModel):
    """A function of one model (of each definition), ready to run over all models.

    Args:
        definitions: The definitions whose prototypes the function gets.
        body: ``body(*prototypes, *trees)``, the work of one model; returns a pytree.
    """

    definitions: list[BatchableDefinition]  # type: ignore[assignment]

    def __init__(self, definitions: Sequence[BatchableDefinition], body: Callable[..., Any]) -> None:
        super().__init__(definitions, body)

    def batchable(self) -> AbstractContextManager[Any]:
        """Return a context in which submodules that vmap cannot run are of classes that it can.

        Raises:
            RuntimeError: A submodule has backward hooks, which vmap would pass over in silence.
        """
        self.refuse_backward_hooks()
        return self._swapped()

    def _swapped(self) -> AbstractContextManager[Any]:
        with_gaps = [definition for definition in self.definitions if definition.has_gaps]
        if len(with_gaps) < 2:
            return with_gaps[0].batchable() if with_gaps else nullcontext()
        stack = ExitStack()
        for definition in with_gaps:
            stack.enter_context(definition.batchable())
        return stack

    def one(
        self, tensors: list[list[Tensor]], key: Tensor | None, trees: tuple[Any, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run one model (under vmap: the one that stands for all).

        Args:
            tensors: For each definition, one model's tensors.
            key: The model's random key, or None for torch's own generator.
            trees: What ``body`` gets after the prototypes.

        Returns:
            The tensors of the result, and the buffers that were replaced.
        """
        drew = False
        if key is None:
            result, replaced = self.call(tensors, trees)
        else:
            with seeded(key) as stream:
                result, replaced = self.call(tensors, trees)
            drew = stream.draws > 0
        outputs, packing = pack(result)
        if not torch.compiler.is_compiling():
            self.trace = Trace(packing, [list(positions) for positions in replaced], drew)
        return outputs, [value for values in replaced for value in values.values()]

    def at_once(
        self,
        tensors: list[list[Tensor]],
        keys: Tensor | None,
        trees: tuple[Any, ...],
        dims: tuple[int | None, ...],
        size: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run all models in one vectorised pass; ``dims`` as `Arguments` gives them."""
        mapped, with_mapped = split_leaves(trees, dims)

        def one(
            tensors: list[list[Tensor]], key: Tensor | None, mapped: list[Tensor], anchor: Tensor
        ) -> tuple[list[Tensor], list[Tensor]]:
            with honoured_autocast():
                return self.one(tensors, key, with_mapped(mapped))

        # The anchor gives vmap its size where nothing else is mapped.
        in_dims = (0, None if keys is None else 0, 0, 0)
        run = torch.vmap(one, in_dims=in_dims, randomness=randomness(keys))
        with nullcontext() if torch.compiler.is_compiling() else stacked_linear():
            return run(tensors, keys, mapped, torch.empty(size, 0))

    def _drawing(self, keys: Tensor | None) -> AbstractContextManager[None]:
        """Where models draw from their own streams, layers that draw in native code must not run as they are."""
        return nullcontext() if keys is None else self._swapped()

    def directly(
        self, tensors: list[list[Tensor]], keys: Tensor | None, arguments: Arguments
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the only model without vmap, as plain PyTorch would; ``tensors`` and results have no model axis."""
        with self._drawing(keys):
            return self.one(tensors, None if keys is None else keys[0], arguments.of_model(0))

    def one_by_one(
        self, tensors: list[list[Tensor]], keys: Tensor | None, arguments: Arguments
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the models one after another; slow, but what runs alone runs here."""
        unstacked = [[tensor.unbind(0) for tensor in stacks] for stacks in tensors]
        size = next((len(stacks[0]) for stacks in tensors if stacks), None) or arguments.num_models
        results = []
        for index in range(size):
            own = [[column[index] for column in columns] for columns in unstacked]
            key = None if keys is None else keys[index]
            with self._drawing(keys):
                shares = arguments.own_copies().of_model(index)
                results.append((*self.one(own, key, shares), self.trace))
        return _stack(results)


def with_model_axis(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of a single model as stacks of one."""
    return [tensor.unsqueeze(0) for tensor in tensors]


def randomness(keys: Tensor | None) -> str:
    """How vmap treats torch's own generator: as one stream for all models, or as an error if they have their own."""
    return "different" if keys is None else "error"


def split_leaves(
    trees: tuple[Any, ...], dims: Sequence[int | None]
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], tuple[Any, ...]]]:
    """Return the leaves to be mapped, and a function that puts others in their places.

    vmap would take the trees themselves, but not where a container refuses the numbers of ``in_dims`` as its
    contents, which ``PackedSequence`` does.
    """
    if all(dim is None for dim in dims):
        return [], lambda mapped: trees
    leaves, structure = pytree.tree_flatten(trees)

    def with_mapped(mapped: Sequence[Tensor]) -> tuple[Any, ...]:
        remaining = iter(mapped)
        chosen = [leaf if dim is None else next(remaining) for leaf, dim in zip(leaves, dims, strict=True)]
        return pytree.tree_unflatten(chosen, structure)

    return [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim is not None], with_mapped


class Fallback:
    """Tries the vectorised way first and falls back, once and for all, to one model after another.

    Args:
        definitions: The definitions that are run.
    """

    def __init__(self, definitions: Sequence[BatchableDefinition]) -> None:
        self.definitions = list(definitions)
        # Why, for training (True) and evaluation (False): a layer may be batchable in one of them only.
        self._reasons: dict[bool, str] = {}
        self._proven: set[bool] = set()

    @property
    def _training(self) -> bool:
        return any(definition.prototype.training for definition in self.definitions)

    @property
    def one_by_one(self) -> bool:
        """Whether models run one after another in the present mode, training or evaluation."""
        return self._training in self._reasons

    @property
    def reason(self) -> str | None:
        """Why models run one after another in the present mode; None if they do not."""
        return self._reasons.get(self._training)

    @property
    def reasons(self) -> dict[str, str]:
        """Why models run one after another, for each mode ("train", "eval") in which they do."""
        return {"train" if training else "eval": reason for training, reason in self._reasons.items()}

    def run(
        self,
        at_once: Callable[[Arguments], T],
        one_by_one: Callable[[Arguments], T],
        arguments: Arguments,
        buffers: Sequence[Tensor],
    ) -> T:
        """Return what ``at_once`` makes of the arguments or, where vmap cannot, ``one_by_one``, with a warning.

        ``buffers`` are those that a pass may change; after a failed try they are put back.
        """
        training = self._training
        if training in self._reasons:
            return one_by_one(arguments)
        # A pass that fails half-way has already updated some buffers and may have changed its inputs.
        proven = training in self._proven
        buffers = buffers if training or not proven else []
        saved = [buffer.clone() for buffer in buffers]
        versions = arguments.versions()
        try:
            given = arguments if proven else arguments.own_copies()
            result = at_once(given)
            if not proven:
                arguments.take_changes(given)
            self._proven.add(training)
            return result
        except (ModelBatchError, torch.OutOfMemoryError):
            _put_back(buffers, saved)
            raise
        except Exception as caught:  # torch.func has no error class of its own
            _put_back(buffers, saved)
            if arguments.versions() != versions:
                raise
            error = caught
        try:
            # An error of the model itself is raised here, as plain PyTorch words it.
            result = one_by_one(arguments)
        except Exception:
            _put_back(buffers, saved)
            raise
        first_line = str(error).strip().split("\n", 1)[0]
        self._reasons[training] = f"{self._culprit(error)} cannot be batched ({first_line[:160]})"
        warnings.warn(
            f"{self._reasons[training]}; its models run one after another, correct but no faster than a loop",
            UserWarning,
            stacklevel=4,
        )
        return result

    def _culprit(self, error: Exception) -> str:
        """Name the innermost submodule in the traceback."""
        name = "the loss"
        traceback = error.__traceback__
        while traceback is not None:
            module = traceback.tb_frame.f_locals.get("self")
            for definition in self.definitions:
                name = definition.module_name(module) or name  # type: ignore[arg-type]
            traceback = traceback.tb_next
        return name


def _put_back(buffers: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, saved, strict=True):
        buffer.copy_(value)


def _stack(
    results: list[tuple[list[Tensor], list[Tensor], Trace | None]],
) -> tuple[list[Tensor], list[Tensor]]:
    first = results[0]
    for index, (outputs, _, trace) in enumerate(results):
        assert trace is not None
        assert first[2] is not None
        if (trace.packing, trace.replaced) != (first[2].packing, first[2].replaced):
            raise Unsupported(f"model {index} returned another structure than model 0: {trace.packing.structure}")
        for ours, theirs in zip(first[0], outputs, strict=True):
            if ours.shape != theirs.shape:
                raise InvalidInput(
                    f"output of model {index}",
                    received=f"shape {tuple(theirs.shape)}",
                    expected=f"shape {tuple(ours.shape)} as from model 0",
                )
    outputs = [torch.stack(column) for column in zip(*(r[0] for r in results), strict=True)]
    replaced = [torch.stack(column) for column in zip(*(r[1] for r in results), strict=True)]
    return outputs, replaced
