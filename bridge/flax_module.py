"""Torch modules as modules of flax.nnx."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from bridge.arrays import to_jax
from bridge.calls import Arguments, Body, Calls, Program, Report, example, has_64_bits
from bridge.dtypes import as_jax_dtype, torch_dtypes
from mb_torch.errors import InvalidInput, Unsupported

Key = jax.Array
State = Mapping[str, Any]


class Frozen(nnx.Variable[jax.Array]):
    """A parameter that is not trained (``requires_grad=False``): no ``nnx.Param``, so gradients leave it out.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.bias.requires_grad_(False)
        >>> [*nnx.state(TorchModule(layer), Frozen)]
        ['bias']
    """


class TorchModule(nnx.Module):
    """A torch module as a flax.nnx module with the same variables, under the names that they have in torch.

    Parameters are ``nnx.Param``, frozen ones `Frozen`, buffers ``nnx.BatchStat``. Names keep their dots
    (``module["0.weight"]`` is the variable). Tied tensors are one variable, under its first name. All that flax does
    to modules works: ``nnx.split`` and ``nnx.merge``, ``nnx.jit``, ``nnx.grad``, optimizers, ``train()`` and
    ``eval()``. Submodules start in the mode of the torch module; ``nnx.view`` takes ``deterministic=``.

    Every form of the inputs is translated, and compared with PyTorch, at its first use. Inside ``jax.jit``, where
    arrays have no values yet, the comparison uses made-up ones of the same shapes.

    Dtypes are those of PyTorch with or without ``jax.enable_x64``: a BatchNorm's int64 counter stays int64, float64
    is computed in float64, and int32 inputs become int64 where JAX has no other integers. What is computed outside,
    the update of an optimizer say, follows JAX: train float64 parameters with ``jax.enable_x64`` on, and see
    `bridge.calls` for what JAX does not compile without it. Gradients are those of JAX: of a complex parameter the
    conjugate of PyTorch's.

    Args:
        module: The torch module; copied.
        num_models: Give every variable a leading axis of so many models. A call then runs all of them.
        values: Values of the variables by name, in place of the module's own; with ``num_models`` stacked ones. The
            module may then be on the meta device.
        translator: See `bridge.translators.translate_function`.
        verify: Whether to compare translations with PyTorch and refuse what differs.
        convolution: How convolutions are computed: ``"native"``, or ``"matmul"``, which is the faster one for several
            models on a CPU.

    Attributes:
        num_models: As given.
        deterministic: True for evaluation, False for training; None leaves each submodule as it was.

    Raises:
        InvalidInput: Values that do not fit, or a module whose lazy parameters have no shapes yet.
        Unsupported: Backward hooks, or a parameter with a name that flax.nnx uses itself.

    Example:
        >>> module = TorchModule(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
        >>> sorted(nnx.state(module, nnx.Param))
        ['0.bias', '0.weight', '1.bias', '1.weight']
        >>> module(jnp.ones((4, 3))).shape, int(module["1.num_batches_tracked"][...])
        ((4, 2), 1)
        >>> stacked = TorchModule(nn.Linear(3, 2), num_models=5)
        >>> stacked["weight"].shape, stacked(jnp.ones((4, 3))).shape
        ((5, 2, 3), (5, 4, 2))
    """

    num_models: int | None
    deterministic: bool | None

    def __init__(
        self,
        module: nn.Module,
        *,
        num_models: int | None = None,
        values: Mapping[str, jax.Array | Tensor] | None = None,
        translator: str = "auto",
        verify: bool = True,
        convolution: str = "native",
    ) -> None:
        calls = Calls(translator=translator, verify=verify, convolution=convolution)
        self._definition = _Definition(module, calls)
        self.num_models = num_models
        self.deterministic = None
        arrays = self._definition.own_values(module, num_models) if values is None else _as_arrays(values)
        self._definition.check(arrays, num_models)
        for name, tensor in self._definition.tensors.items():
            if hasattr(self, name):
                raise Unsupported(f"a tensor named {name!r}: flax.nnx modules have that attribute", fix="Rename it.")
            setattr(self, name, _kind(tensor)(arrays[name]))

    def __getitem__(self, name: str) -> nnx.Variable[jax.Array]:
        """The variable that holds the tensor of this name; a tied tensor has several."""
        try:
            variable: nnx.Variable[jax.Array] = getattr(self, self._definition.first_names[name])
        except KeyError:
            names = list(self._definition.first_names)
            raise InvalidInput("a variable", received=repr(name), expected=f"one of {names}") from None
        return variable

    def set_view(self, deterministic: bool | None = None) -> None:
        """Let ``nnx.view`` choose the mode.

        Args:
            deterministic: True for evaluation, False for training.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def arrays(self) -> dict[str, jax.Array]:
        """The values of all variables by name: a state for `apply`.

        Example:
            >>> list(TorchModule(nn.Linear(3, 2)).arrays())
            ['weight', 'bias']
        """
        return {name: getattr(self, name).get_value() for name in self._definition.tensors}

    def __call__(
        self, *inputs: Any, rngs: nnx.Rngs | nnx.RngStream | Key | None = None, per_model: bool = False, **kwargs: Any
    ) -> Any:
        """Run the module, or all models, and write changed buffers back.

        Args:
            *inputs: The positional arguments of the torch module, with arrays in the places of tensors.
            rngs: Where random numbers come from, if it draws any: ``nnx.Rngs`` (the stream ``dropout``, else the
                default), one stream, or a key, which gives the same numbers each time.
            per_model: With ``num_models``, whether the arrays among the arguments have a leading model axis too.
            **kwargs: The keyword arguments of the torch module.

        Returns:
            What the torch module returns, with arrays in the places of tensors; with ``num_models`` they have a
            leading model axis.

        Raises:
            InvalidInput: ``rngs`` is needed, or an input or variable has another form than it must have.
            Unsupported: The module has no translation for these inputs.

        Example:
            >>> layer = TorchModule(nn.Dropout(0.5))
            >>> layer(jnp.ones(1000), rngs=nnx.Rngs(0)).shape
            (1000,)
        """
        outputs, changed = self._run(self.arrays(), rngs, inputs, kwargs, per_model)
        for name, array in changed.items():
            getattr(self, name).set_value(array)
        return outputs

    def apply(
        self, state: State, key: Key | None, *inputs: Any, per_model: bool = False, **kwargs: Any
    ) -> tuple[Any, State]:
        """Run the module as a pure function of its state, for use under a plain ``jax.jit``.

        The module's own variables are neither read nor changed. A call of a jitted function of a flat dict costs less
        than a tenth of an ``nnx.jit`` call.

        Args:
            state: A flat dict of arrays by name, as from `arrays`, or a state, as from ``nnx.state``.
            key: The random key of this call; None if it draws nothing.
            *inputs: As for a call.
            per_model: As for a call.
            **kwargs: As for a call.

        Returns:
            The outputs, and the state with changed buffers, in the form in which it was given.

        Raises:
            InvalidInput: As for a call, or the state lacks variables.
            Unsupported: As for a call.

        Example:
            >>> module = TorchModule(nn.BatchNorm1d(3))
            >>> run = jax.jit(module.apply)
            >>> outputs, state = run(module.arrays(), None, jnp.ones((4, 3)))
            >>> int(state["num_batches_tracked"]), int(module["num_batches_tracked"][...])
            (1, 0)
        """
        outputs, changed = self._run(values_of(state), key, inputs, kwargs, per_model)
        updated = {name: old if name not in changed else _with_value(old, changed[name]) for name, old in state.items()}
        return outputs, nnx.State(updated) if isinstance(state, nnx.State) else updated

    def prepare(self, *inputs: Any, per_model: bool = False, **kwargs: Any) -> None:
        """Translate for inputs of this form now instead of at the first call.

        Args:
            *inputs: As for a call.
            per_model: As for a call.
            **kwargs: As for a call.

        Example:
            >>> module = TorchModule(nn.Linear(3, 2))
            >>> module.prepare(torch.ones(4, 3))
            >>> len(module.report())
            1
        """
        self._program(self.arrays(), Arguments(inputs, kwargs), per_model)

    def report(self) -> list[Report]:
        """Say which translator serves each form of the inputs so far, and how far from PyTorch it was.

        Example:
            >>> module = TorchModule(nn.Linear(3, 2))
            >>> _ = module(jnp.ones((4, 3)))
            >>> module.report()[0].inputs, module.report()[0].largest < 1e-12
            (('float32[4, 3]',), True)
        """
        return self._definition.calls.reports()

    def _run(
        self,
        state: Mapping[str, jax.Array],
        rngs: nnx.Rngs | nnx.RngStream | Key | None,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        per_model: bool,
    ) -> tuple[Any, dict[str, jax.Array]]:
        arguments = Arguments(inputs, kwargs)
        program = self._program(state, arguments, per_model)
        names = list(self._definition.tensors)
        own, key = [state[name] for name in names], _key(program, rngs)
        if self.num_models is None:
            outputs, changed = program.run(own, arguments.arrays, key)
        else:
            outputs, changed = program.run_stacked(
                own, arguments.arrays, key, per_model=per_model, num_models=self.num_models
            )
        return outputs, {names[position]: array for position, array in changed.items()}

    def _program(self, state: Mapping[str, jax.Array], arguments: Arguments, per_model: bool) -> Program:
        self._definition.check(state, self.num_models)
        if per_model:
            if self.num_models is None:
                raise InvalidInput("per_model=True", received="a module without num_models", expected="a stacked one")
            arguments.check_model_axis(self.num_models)
        return self._definition.program(
            self.deterministic, state, arguments, stacked=self.num_models is not None, per_model=per_model
        )


class _Definition:
    """What modules with the same torch code share; to flax a constant."""

    def __init__(self, module: nn.Module, calls: Calls) -> None:
        _refuse(module)
        self.prototype = _on_meta(module)
        # Parameters, then buffers, each once.
        self.tensors = {**dict(self.prototype.named_parameters()), **dict(self.prototype.named_buffers())}
        first = {id(tensor): name for name, tensor in self.tensors.items()}
        self.first_names = {
            name: first[id(tensor)]
            for named in (self.prototype.named_parameters, self.prototype.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        }
        self.calls = calls

    def __deepcopy__(self, memo: dict[int, Any]) -> _Definition:
        # Nothing in it changes, and copies of a module share their programs.
        return self

    def own_values(self, module: nn.Module, num_models: int | None) -> dict[str, jax.Array]:
        """The module's own values, the same for every model."""
        arrays = {name: to_jax(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        if num_models is None:
            return arrays
        with torch_dtypes():
            return {name: jnp.repeat(array[None], num_models, axis=0) for name, array in arrays.items()}

    def check(self, arrays: Mapping[str, jax.Array], num_models: int | None) -> None:
        """Raise `InvalidInput` unless names, shapes and dtypes are those of the variables."""
        missing = [name for name in self.tensors if name not in arrays]
        unknown = [name for name in arrays if name not in self.tensors]
        if missing or unknown:
            raise InvalidInput(f"the variables do not fit: missing {missing}, unknown {unknown}")
        leading = () if num_models is None else (num_models,)
        for name, tensor in self.tensors.items():
            array, shape, dtype = arrays[name], (*leading, *tensor.shape), as_jax_dtype(tensor.dtype)
            if array.shape != shape or array.dtype != dtype:
                narrowed = dtype.itemsize > array.dtype.itemsize and not has_64_bits()
                raise InvalidInput(
                    f"variable {name!r}",
                    received=f"{array.dtype} of shape {array.shape}",
                    expected=f"{dtype} of shape {shape}",
                    fix="Without jax.enable_x64, JAX computes in 32 bits outside of the module." if narrowed else None,
                )

    def program(
        self,
        deterministic: bool | None,
        state: Mapping[str, jax.Array],
        arguments: Arguments,
        *,
        stacked: bool,
        per_model: bool,
    ) -> Program:
        """The program for a mode and arguments of this form; see `TorchModule`."""

        def own(signed: bool) -> list[Tensor]:
            tensors = []
            for index, (name, tensor) in enumerate(self.tensors.items()):
                # Buffers are not made negative: a variance is not.
                signed_too = signed and isinstance(tensor, nn.Parameter)
                made = example(state[name], 1000 + index, signed=signed_too, first_of_many=stacked)
                tensors.append(made.requires_grad_(tensor.requires_grad))
            return tensors

        return self.calls.program(
            deterministic, arguments, lambda: self._prepared(deterministic), own, per_model=per_model
        )

    def _prepared(self, deterministic: bool | None) -> tuple[Body, Sequence[nn.Module]]:
        model = _on_meta(self.prototype)
        if deterministic is not None:
            model.train(not deterministic)
        names = list(self.tensors)

        def call(state: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
            # Tensors that the pass leaves on a submodule belong to this pass.
            before = [(submodule, dict(vars(submodule))) for submodule in model.modules()]
            tensors = dict(zip(names, state, strict=True))
            try:
                # Buffers that the pass replaces are replaced in `tensors`.
                result = functional_call(model, tensors, args, kwargs)
            finally:
                for submodule, attributes in before:
                    vars(submodule).clear()
                    vars(submodule).update(attributes)
            removed = [name for name in names if not isinstance(tensors.get(name), Tensor)]
            if removed:
                raise Unsupported(f"forward() removed {removed}; buffers may only be replaced, by tensors")
            return result, [tensors[name] for name in names]

        return call, [model]


def values_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a state whose entries are variables or arrays, by name.

    Example:
        >>> values_of(nnx.state(TorchModule(nn.Linear(3, 2))))["bias"].shape
        (2,)
    """
    return {name: entry.get_value() if isinstance(entry, nnx.Variable) else entry for name, entry in state.items()}


def _with_value(old: Any, array: jax.Array) -> Any:
    return old.replace(array) if isinstance(old, nnx.Variable) else array


def _kind(tensor: Tensor) -> type[nnx.Variable[Any]]:
    if not isinstance(tensor, nn.Parameter):
        return nnx.BatchStat
    return nnx.Param if tensor.requires_grad else Frozen


def _as_arrays(values: Mapping[str, jax.Array | Tensor]) -> dict[str, jax.Array]:
    return {name: to_jax(value) if isinstance(value, Tensor) else value for name, value in values.items()}


def _key(program: Program, rngs: nnx.Rngs | nnx.RngStream | Key | None) -> Key | None:
    if not program.draws:
        return None
    if isinstance(rngs, nnx.Rngs) and ("dropout" in rngs or "default" in rngs):
        key: Key = rngs["dropout"]()
        return key
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if isinstance(rngs, jax.Array):
        return rngs
    raise InvalidInput(
        "the module draws random numbers",
        received="no key" if rngs is None else f"rngs={type(rngs).__name__} without a stream 'dropout' or 'default'",
        expected="rngs=nnx.Rngs(seed) or a key",
    )


def _refuse(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise InvalidInput("TorchModule", received=type(module).__name__, expected="a torch.nn.Module")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise InvalidInput(f"{name!r} has no shape yet", fix="Run the module once on an example batch first.")
    for name, submodule in module.named_modules():
        if submodule._backward_hooks or submodule._backward_pre_hooks:
            raise Unsupported(f"{name or 'the module'} ({type(submodule).__name__}) has backward hooks")


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy with its parameters and buffers on the meta device; ties are kept."""
    replaced: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        replaced[id(buffer)] = torch.empty_like(buffer, device="meta")
    for submodule in module.modules():
        for value in vars(submodule).values():
            # deepcopy refuses tensors that are results, such as the weight a weight_norm hook has computed.
            if isinstance(value, Tensor) and value.grad_fn is not None:
                replaced[id(value)] = value.detach()
    return copy.deepcopy(module, replaced)
