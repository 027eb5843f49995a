"""A torch callable on JAX arrays: translated at first use, once for each form of its arguments.

Translated programs compute with the dtypes of PyTorch, whether or not ``jax.enable_x64`` is on where they are called.
Without it JAX's integers have 32 bits where PyTorch's have 64, and many functions of PyTorch (``cross_entropy``,
``gather``) take no others: then int32 arguments are given to the torch code as int64. Results have the dtypes that
PyTorch gives them.

JAX compiles a program under the settings of the outermost ``jax.jit``. Where these are without 64-bit types, it
refuses a few operations on int64 (``argmax``, adaptive pooling) with an error about types; calls under
``jax.enable_x64(True)``, or without an outer ``jax.jit``, compile them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bridge.arrays import to_jax, to_torch
from bridge.by_value import NOTHING, ByValue, Knowable
from bridge.dtypes import torch_dtypes
from bridge.keys import constant_key, surroundings
from bridge.taken import Taken
from bridge.translators import translate_function
from mb_torch.errors import InvalidInput, ModelBatchError, Unsupported

Body = Callable[[list[Tensor], tuple[Any, ...], dict[str, Any]], tuple[Any, Sequence[Tensor]]]
"""``body(state, args, kwargs)`` -> the result and the new values of the state."""

_ARRAY = object()


class Report(NamedTuple):
    """How arguments of one form are served.

    Attributes:
        inputs: The dtypes and shapes of the arrays among the arguments.
        translator: Which translator made the program.
        largest: The largest difference from PyTorch that the comparison showed; None if it was not compared.
        where: In which output or gradient.
    """

    inputs: tuple[str, ...]
    translator: str
    largest: float | None
    where: str | None


class Form(NamedTuple):
    """Arguments without their arrays.

    Attributes:
        leaves: All leaves, with a mark in the places of arrays.
        structure: How they are nested.
    """

    leaves: list[Any]
    structure: pytree.TreeSpec

    def trees(self, replacements: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the arguments together with other things in the places of the arrays."""
        remaining = iter(replacements)
        args, kwargs = pytree.tree_unflatten(
            [next(remaining) if leaf is _ARRAY else leaf for leaf in self.leaves], self.structure
        )
        return args, kwargs


class Arguments:
    """The arguments of a call, taken apart into arrays and everything else.

    Args:
        args: Pytrees of JAX or NumPy arrays, tensors and other objects.
        kwargs: The same, by name.

    Attributes:
        arrays: The arrays in a row.
        require_grad: For each of them, whether it was given as a tensor that requires gradients.
        form: Everything else.

    Example:
        >>> arguments = Arguments((np.zeros((2, 3), np.float32), 5), {})
        >>> [array.shape for array in arguments.arrays], arguments.form.trees(["x"])
        ([(2, 3)], (('x', 5), {}))
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given, structure = pytree.tree_flatten((args, kwargs))
        leaves = [_as_array(leaf) for leaf in given]
        pairs = [(leaf, old) for leaf, old in zip(leaves, given, strict=True) if isinstance(leaf, jax.Array)]
        self.arrays = [array for array, _ in pairs]
        self.require_grad = [isinstance(old, Tensor) and old.requires_grad for _, old in pairs]
        self.form = Form([_ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in leaves], structure)

    def key(self, *, per_model: bool) -> Hashable:
        """What a program of one model is specialised on: shapes, dtypes, and every value that is no array."""
        arrays = tuple((array.shape[1:] if per_model else array.shape, array.dtype) for array in self.arrays)
        return self.form.structure, arrays, tuple(constant_key(leaf) for leaf in self.form.leaves)

    def knowable(self, *, per_model: bool, tried: Sequence[int] | None) -> Knowable:
        """Which of the arrays a program may be made for the values of: integers that have values."""
        places = tuple(
            place
            for place, array in enumerate(self.arrays)
            if array.dtype in (np.int32, np.int64) and not isinstance(array, jax.core.Tracer)
        )
        own = tuple(tried) if tried is not None else None
        return Knowable(() if per_model else places, places if per_model else (), own)

    def check_values(self, places: Sequence[int]) -> None:
        """Raise `Unsupported` unless these arrays have values, which those of a function inside ``jax.jit`` lack."""
        for place in places:
            if isinstance(self.arrays[place], jax.core.Tracer):
                raise Unsupported(
                    f"array {place} of the arguments has no value inside jax.jit, and a torch function looks at it",
                    fix="Pass it as a NumPy array that the jitted function has caught, or call outside of jax.jit.",
                )

    def check_model_axis(self, num_models: int) -> None:
        """Raise `InvalidInput` unless all arrays have a leading model axis."""
        for array in self.arrays:
            if array.ndim == 0 or len(array) != num_models:
                raise InvalidInput(
                    "an input with per_model=True", received=f"shape {array.shape}", expected=f"[{num_models}, ...]"
                )


class Calls:
    """The programs of one torch function, one for each form of its arguments.

    Args:
        translator: See `bridge.translators.translate_function`.
        verify: See there.
        convolution: How convolutions are computed, ``"native"`` or ``"matmul"``.
        differentiable: For each array among the arguments, whether gradients of it are compared. Default: of all
            floats.
    """

    def __init__(
        self,
        *,
        translator: str = "auto",
        verify: bool = True,
        convolution: str = "native",
        differentiable: Sequence[bool] | None = None,
    ) -> None:
        self._translator = translator
        self._verify = verify
        self._convolution = convolution
        self._differentiable = differentiable
        self._programs: ByValue[Program] = ByValue()

    def program(
        self,
        settings: Hashable,
        arguments: Arguments,
        prepare: Callable[[], tuple[Body, Sequence[nn.Module]]],
        state: Callable[[bool], list[Tensor]] = lambda signed: [],
        *,
        per_model: bool = False,
    ) -> Program:
        """Return the program for arguments of this form.

        Args:
            settings: What else the program is specialised on.
            arguments: The arguments.
            prepare: Returns the torch function, and the modules it calls for names in errors.
            state: Makes one model's state; see `example` for its argument.
            per_model: Whether the arguments' arrays have a leading model axis.
        """
        key = (settings, arguments.key(per_model=per_model), surroundings())
        tried = self._programs.places(key)
        arguments.check_values(tried or ())
        program = self._programs.get(key, arguments.arrays)
        if program is None or not program.is_current():
            # The translation itself is computed at once, also where JAX is tracing the call.
            with jax.ensure_compile_time_eval(), torch_dtypes():
                program = self._translated(arguments, prepare, state, per_model, tried)
            self._programs.put(key, program.by_value, arguments.arrays, program)
        return program

    def _translated(
        self,
        arguments: Arguments,
        prepare: Callable[[], tuple[Body, Sequence[nn.Module]]],
        state: Callable[[bool], list[Tensor]],
        per_model: bool,
        tried: Sequence[int] | None,
    ) -> Program:
        body, modules = prepare()

        def attempt(signed: bool) -> Program:
            given = [
                example(array, seed, signed=signed, first_of_many=per_model)
                for seed, array in enumerate(arguments.arrays)
            ]
            for index, tensor in enumerate(given):
                smooth = tensor.is_floating_point() or tensor.is_complex()
                tensor.requires_grad_(smooth and (self._differentiable is None or self._differentiable[index]))
            return Program(
                body,
                state(signed),
                given,
                arguments.form,
                modules,
                translator=self._translator,
                verify=self._verify,
                convolution=self._convolution,
                knowable=arguments.knowable(per_model=per_model, tried=tried),
            )

        try:
            return attempt(signed=True)
        except ModelBatchError:
            raise
        except Exception:
            # Made-up values may be none that the function takes: it wants probabilities, or a smaller index.
            return attempt(signed=False)

    def reports(self) -> list[Report]:
        """One report for each form of the arguments so far."""
        return [program.report for program in self._programs.entries()]


def example(array: jax.Array, seed: int, *, signed: bool, first_of_many: bool = False) -> Tensor:
    """A tensor with the values of an array; where it has none yet, inside ``jax.jit``, with made-up ones.

    Args:
        array: An array or what stands for one while JAX traces a function.
        seed: Fixes the made-up values.
        signed: They are -1 to 1, integers 0 or 1; otherwise 0 to 1, and integers 0.
        first_of_many: Whether to take the first of a leading model axis.
    """
    shape = array.shape[1:] if first_of_many else array.shape
    if not isinstance(array, jax.core.Tracer) and array.is_fully_addressable:
        own = array[0] if first_of_many else array
        return to_torch(jax.device_put(own, jax.local_devices(backend="cpu")[0])).clone()
    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise Unsupported(f"torch tensors of JAX's {array.dtype}")
    if not (dtype.is_floating_point or dtype.is_complex):
        return (torch.arange(math.prod(shape)) % (2 if signed else 1)).reshape(shape).to(dtype)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * values - 1 if signed else values).to(dtype)


class Program:
    """A torch function of a state and arguments, translated.

    Args:
        body: The function.
        state: Example tensors of the state.
        given: Example tensors in the places of the arguments' arrays.
        form: The arguments without arrays.
        modules: Modules that the function calls, for names in errors.
        translator: See `Calls`.
        verify: See `Calls`.
        convolution: See `Calls`.
        knowable: Arrays of the arguments whose values the program may be made for.

    Attributes:
        changed: Positions of the state's tensors that the function changes.
        by_value: Arrays of the arguments whose values it was made for.
        report: How the translation compared.
    """

    def __init__(
        self,
        body: Body,
        state: Sequence[Tensor],
        given: Sequence[Tensor],
        form: Form,
        modules: Sequence[nn.Module],
        *,
        translator: str,
        verify: bool,
        convolution: str,
        knowable: Knowable = NOTHING,
    ) -> None:
        self._packing: tuple[Any, list[Any]] | None = None
        count = len(state)

        def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
            args, kwargs = form.trees(tensors[count:])
            result, after = body(list(tensors[:count]), args, kwargs)
            leaves, structure = pytree.tree_flatten(result)
            constants = [_ARRAY if isinstance(leaf, Tensor) else _checked(leaf) for leaf in leaves]
            # The comparison runs this again, in float64.
            self._packing = self._packing or (structure, constants)
            return [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *after]

        inputs = [*state, *given]
        translation, comparison, taken = translate_function(
            flat, inputs, modules, translator=translator, verify=verify, knowable=knowable.after(count)
        )
        self._translation = translation
        self._taken = [Taken(tensor) for tensor in taken]
        self.by_value = [place - count for place in translation.known or ()]
        self._convolution = convolution
        self._num_results = len(translation.dtypes) - count
        after = translation.unchanged[self._num_results :]
        self.changed = [position for position, source in enumerate(after) if source != position]
        self.report = Report(
            tuple(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in given),
            translation.translator,
            None if comparison is None else comparison.largest,
            None if comparison is None else comparison.where,
        )
        # Compiled also where nobody else compiles: operation by operation a call takes milliseconds.
        self._one = jax.jit(self._run_one)
        self._stacked: dict[tuple[bool, int], Any] = {}

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return self._translation.draws

    def is_current(self) -> bool:
        """Whether the tensors that the function took from elsewhere have the values that it was translated with."""
        return all(taken.is_current() for taken in self._taken)

    def _run_one(self, arrays: Sequence[jax.Array], key: jax.Array | None) -> tuple[list[jax.Array], list[jax.Array]]:
        outputs = self._translation.run(arrays, key, self._convolution)
        return outputs[: self._num_results], [outputs[self._num_results + position] for position in self.changed]

    def run(
        self, state: Sequence[jax.Array], given: Sequence[jax.Array], key: jax.Array | None
    ) -> tuple[Any, dict[int, jax.Array]]:
        """Run the function.

        Returns:
            The result, arrays in the places of tensors, and the new values of the changed state by position.
        """
        with torch_dtypes():
            results, changed = self._one([*state, *given], key)
        return self._unpacked(results), dict(zip(self.changed, changed, strict=True))

    def run_stacked(
        self,
        state: Sequence[jax.Array],
        given: Sequence[jax.Array],
        key: jax.Array | None,
        *,
        per_model: bool,
        num_models: int,
    ) -> tuple[Any, dict[int, jax.Array]]:
        """Run the function for each model, model *i* with the key ``fold_in(key, i)``.

        Args:
            state: Arrays with a leading model axis.
            given: Arrays with a leading model axis if ``per_model``.
            key: The random key of the call.
            per_model: See ``given``.
            num_models: How many models there are.
        """

        def all_models(state: Any, given: Any, key: jax.Array | None) -> Any:
            def one(number: jax.Array, state: Any, given: Any) -> Any:
                return self._run_one([*state, *given], None if key is None else jax.random.fold_in(key, number))

            return jax.vmap(one, (0, 0, 0 if per_model else None))(jnp.arange(num_models), state, given)

        if (per_model, num_models) not in self._stacked:
            self._stacked[per_model, num_models] = jax.jit(all_models)
        with torch_dtypes():
            results, changed = self._stacked[per_model, num_models](list(state), list(given), key)
        return self._unpacked(results), dict(zip(self.changed, changed, strict=True))

    def _unpacked(self, results: Sequence[jax.Array]) -> Any:
        assert self._packing is not None
        structure, constants = self._packing
        remaining = iter(results)
        leaves = [next(remaining) if constant is _ARRAY else constant for constant in constants]
        try:
            return pytree.tree_unflatten(leaves, structure)
        except Exception as error:
            raise Unsupported(
                f"a torch function returned a container that cannot hold JAX arrays: {structure}",
                fix="Return tensors in tuples, lists or dicts.",
            ) from error


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def _checked(leaf: Any) -> Any:
    if not isinstance(leaf, _PLAIN):
        raise Unsupported(
            f"a torch function returned a {type(leaf).__name__}, which may hold tensors out of reach",
            fix="Return tensors, tuples, lists or dicts, or register the class with torch.utils._pytree.",
        )
    return leaf


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return to_jax(leaf)
    # What has values keeps them inside `jax.jit` too: a program may be made for them.
    with nullcontext() if isinstance(leaf, jax.core.Tracer) else jax.ensure_compile_time_eval():
        if isinstance(leaf, (np.ndarray, np.generic)):
            leaf = jnp.asarray(leaf)
        if isinstance(leaf, jax.Array) and leaf.dtype == np.int32 and not has_64_bits():
            with torch_dtypes():
                return leaf.astype(np.int64)
    return leaf


def has_64_bits() -> bool:
    """Whether JAX has 64-bit types where this is called.

    Example:
        >>> with torch_dtypes():
        ...     has_64_bits()
        True
    """
    return jax.dtypes.canonicalize_dtype(np.int64) == np.int64
