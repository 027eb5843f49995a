"""What the translators that run a torch function on JAX values have in common: learning what it does beforehand.

The function runs once in PyTorch, so that errors of its own are raised as PyTorch words them, and once with abstract
JAX values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import torch
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bridge.arrays import to_jax
from bridge.denied import denial
from bridge.dtypes import as_jax_dtype, torch_dtypes
from bridge.trace import without_fast_paths
from bridge.translation import TensorFunction, Translation
from mb_torch.errors import ModelBatchError, Unsupported


class Executor(Protocol):
    """A package that runs torch functions on JAX values."""

    name: str

    def execute(self, function: TensorFunction, arrays: Sequence[jax.Array], key: jax.Array | None) -> list[jax.Array]:
        """Run a function on arrays, which may be tracers; random numbers are a function of the key alone."""

    @contextmanager
    def note_missing(self, missing: set[str]) -> Iterator[None]:
        """Within the block, note which of the operations that PyTorch runs the package does not know."""


def translate_by_running(executor: Executor, function: TensorFunction, inputs: Sequence[Tensor]) -> Translation:
    """Make a translation that runs the function on the package's tensors whenever JAX traces it.

    Raises:
        Unsupported: The function calls what the package lacks or is known to get wrong, or what fails in it.
    """
    missing: set[str] = set()
    plain, plainly_draws = _run_in_torch(executor, function, inputs, missing)
    with torch_dtypes():
        structs = [_abstract(tensor) for tensor in inputs]
        try:
            with _torch_draws() as drawn_by_torch:
                closed = jax.make_jaxpr(lambda key, arrays: executor.execute(function, arrays, key))(
                    jax.random.key(0), structs
                )
                _differentiate(lambda arrays, key: executor.execute(function, arrays, key), structs)
        except ModelBatchError:
            raise
        except Exception as error:  # whatever a package raises for what it cannot do
            raise Unsupported(_explanation(executor.name, missing, error)) from error
    _check_outputs(executor.name, closed, plain)
    key, *given = closed.jaxpr.invars
    dtypes = [as_jax_dtype(output.dtype) for output in plain]
    draws = any(variable is key for equation in closed.jaxpr.eqns for variable in equation.invars)
    if drawn_by_torch() or _seeds(closed.jaxpr) or (plainly_draws and not draws):
        raise Unsupported(
            f"{executor.name} would draw the same random numbers at each call",
            fix="Draw with functions like torch.randn_like or dropout, without a generator.",
        )

    def run(arrays: Sequence[jax.Array], key: jax.Array | None, convolution: str) -> list[jax.Array]:
        # The package decides how to convolve.
        results = executor.execute(function, arrays, key if draws else None)
        return [result.astype(dtype) for result, dtype in zip(results, dtypes, strict=True)]

    return Translation(
        executor.name,
        run,
        tuple(output.dtype for output in plain),
        draws,
        tuple(_unchanged(closed.jaxpr, given)),
        tuple(_reached(closed.jaxpr, [frozenset(), *(frozenset([index]) for index in range(len(given)))])),
        # Different torch functions may become the same program, one of them wrongly. So no text stands for what was
        # compared, and each translation is.
        text="",
    )


def _abstract(tensor: Tensor) -> Any:
    return jax.ShapeDtypeStruct(tensor.shape, as_jax_dtype(tensor.dtype))


def _differentiate(run: Callable[[list[Any], Any], list[Any]], structs: Sequence[Any]) -> None:
    """Fail now where JAX has no derivative."""
    places = [index for index, struct in enumerate(structs) if jnp.issubdtype(struct.dtype, jnp.inexact)]

    def gradients(arrays: list[Any], key: Any) -> Any:
        def smooth_outputs(smooth: list[Any]) -> list[Any]:
            given = list(arrays)
            for index, array in zip(places, smooth, strict=True):
                given[index] = array
            return [result for result in run(given, key) if jnp.issubdtype(result.dtype, jnp.inexact)]

        results, vjp = jax.vjp(smooth_outputs, [arrays[index] for index in places])
        return vjp([jnp.ones_like(result) for result in results])

    jax.eval_shape(gradients, list(structs), jax.random.key(0))


@contextmanager
def _torch_draws() -> Iterator[Callable[[], bool]]:
    """Says afterwards whether PyTorch's generator was used within the block, which leaves no trace in it."""
    used = False
    with torch.random.fork_rng(devices=[], device_type="cpu"):
        before = torch.get_rng_state()
        yield lambda: used
        used = not torch.equal(before, torch.get_rng_state())


class _Denials(TorchFunctionMode):
    def __init__(self, translator: str) -> None:
        super().__init__()
        self._translator = translator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reason = denial(self._translator, func, args, kwargs or {})
        if reason is not None:
            raise Unsupported(f"{self._translator} would be wrong: {reason}")
        return func(*args, **(kwargs or {}))


class _Output(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype


def _run_in_torch(
    executor: Executor, function: TensorFunction, inputs: Sequence[Tensor], missing: set[str]
) -> tuple[list[_Output], bool]:
    """The form of each output, and whether random numbers are drawn."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        draws = stack.enter_context(_torch_draws())
        stack.enter_context(without_fast_paths())
        stack.enter_context(executor.note_missing(missing))
        stack.enter_context(_Denials(executor.name))
        # Copies: the function may change its inputs in place.
        outputs = [_Output(output.shape, output.dtype) for output in function([leaf.clone() for leaf in leaves])]
    return outputs, draws()


def constant(tensor: Tensor) -> jax.Array:
    """A tensor that depends on no input, as an array with values even while JAX traces."""
    with jax.ensure_compile_time_eval():
        return to_jax(tensor)


def _explanation(name: str, missing: set[str], error: Exception) -> str:
    if missing:
        return f"{name} does not know {', '.join(sorted(missing))}"
    first_line = str(error).strip().split("\n", 1)[0][:300]
    return f"{name} cannot run it: {type(error).__name__}: {first_line}"


def _check_outputs(name: str, closed: ClosedJaxpr, expected: Sequence[_Output]) -> None:
    for index, (aval, output) in enumerate(zip(closed.out_avals, expected, strict=True)):
        wanted = as_jax_dtype(output.dtype)
        # A different precision is converted back; a different kind of number is a mistake.
        same_kind = aval.dtype == wanted or (
            wanted != jnp.bool_
            and any(jnp.issubdtype(aval.dtype, kind) and jnp.issubdtype(wanted, kind) for kind in _KINDS)
        )
        if aval.shape != tuple(output.shape) or not same_kind:
            raise Unsupported(
                f"{name} gives output {index} another form than PyTorch",
                received=f"{aval.dtype} of shape {list(aval.shape)}",
                expected=f"{wanted} of shape {list(output.shape)}",
            )


_KINDS = (jnp.floating, jnp.complexfloating, jnp.integer)


def _unchanged(jaxpr: Jaxpr, given: Sequence[Var]) -> list[int | None]:
    position = {variable: index for index, variable in enumerate(given)}
    copies = {
        equation.outvars[0]: equation.invars[0]
        for equation in jaxpr.eqns
        if equation.primitive.name in ("copy", "copy_p")
    }

    def source(variable: Any) -> int | None:
        while not isinstance(variable, Literal) and variable in copies:
            variable = copies[variable]
        return None if isinstance(variable, Literal) else position.get(variable)

    return [source(variable) for variable in jaxpr.outvars]


def _seeds(jaxpr: Jaxpr) -> bool:
    """Whether a random key is made from a number, so that it does not depend on the key that is given."""
    return any(
        equation.primitive.name == "random_seed" or any(_seeds(inner) for inner in inside(equation))
        for equation in jaxpr.eqns
    )


def inside(equation: Any) -> Iterator[Jaxpr]:
    """The programs that an operation runs: the body of a loop, what a call calls."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, Jaxpr)):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


# Calls, as opposed to loops and branches, hand each argument to the parameter at its place.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}


def _reached(jaxpr: Jaxpr, sources: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """For each output the inputs it depends on through float values, taking in all that a loop or branch is given."""
    reached: dict[Any, frozenset[int]] = {
        variable: source if _smooth(variable) else frozenset()
        for variable, source in zip(jaxpr.invars, sources, strict=True)
    }

    def read(variable: Any) -> frozenset[int]:
        return frozenset() if isinstance(variable, Literal) else reached.get(variable, frozenset())

    for equation in jaxpr.eqns:
        given = [read(variable) for variable in equation.invars]
        inner = _called(equation)
        if inner is not None:
            results = _reached(inner, given)
        elif equation.primitive.name == "stop_gradient":
            results = [frozenset()] * len(equation.outvars)
        else:
            results = [frozenset().union(*given)] * len(equation.outvars)
        for variable, result in zip(equation.outvars, results, strict=True):
            reached[variable] = result if _smooth(variable) else frozenset()
    return [read(variable) for variable in jaxpr.outvars]


def _called(equation: Any) -> Jaxpr | None:
    if equation.primitive.name not in _CALLS:
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    return inner if isinstance(inner, Jaxpr) and len(inner.invars) == len(equation.invars) else None


def _smooth(variable: Any) -> bool:
    return bool(jnp.issubdtype(variable.aval.dtype, jnp.inexact))
