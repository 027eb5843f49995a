"""Compares a translation with PyTorch: outputs, gradients and changed tensors, in float64, on real inputs.

float32 cannot tell right from nearly right: an approximate gelu in place of the exact one passes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bridge.arrays import to_jax, to_torch
from bridge.dtypes import torch_dtypes
from bridge.in_place import changed_arguments, changes_first_argument
from bridge.known import with_known
from bridge.trace import without_fast_paths
from bridge.translation import TensorFunction, Translation, Translator
from mb_torch.errors import ModelBatchError, Unsupported

BOUND = 1e-9
"""Largest difference that is accepted, relative to values above 1."""

# The comparison runs once: compiling it must be quick, not its result.
_QUICK_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Comparison(NamedTuple):
    """What a comparison showed.

    Attributes:
        largest: The largest difference seen, relative to values above 1.
        where: In which output or gradient.
        dtype: The precision in which both sides computed.
    """

    largest: float
    where: str
    dtype: torch.dtype


def compare(
    translator: Translator,
    function: TensorFunction,
    inputs: Sequence[Tensor],
    modules: Sequence[nn.Module] = (),
    known: Sequence[int] | None = None,
) -> Comparison:
    """Run a function in PyTorch and as translated, in float64 and with what is random replaced by fixed numbers.

    Args:
        translator: Translates the function once more, for float64.
        function: The torch function.
        inputs: Real inputs of one model.
        modules: Modules that the function calls, for names in errors.
        known: See `bridge.translation.Translation`.

    Returns:
        The largest difference between outputs and between gradients with respect to all inputs that require them.
    """
    with _default_dtype(torch.float64):
        wide = [_widened(tensor) for tensor in inputs]
        fixed = _without_randomness(function)
        expected, expected_grads, weights = _in_torch(fixed, wide)
        recorded = fixed if known is None else _without_randomness(with_known(function, wide, known))
        translation = translator.translate(recorded, wide, modules)
        if translation.draws:
            return Comparison(0.0, "nothing: it draws random numbers that cannot be fixed", torch.float64)
        try:
            outputs, grads = _in_jax(translation, wide, weights)
        except ModelBatchError:
            raise
        except Exception as error:  # of JAX or of a lowering
            first_line = str(error).strip().split("\n", 1)[0]
            raise Unsupported(f"{type(error).__name__} when compared with PyTorch: {first_line}") from error
    differences = [
        *((_difference(a, b), f"output {index}") for index, (a, b) in enumerate(zip(outputs, expected, strict=True))),
        *(
            (_difference(a, b), f"gradient of input {index}")
            for (index, b), a in zip(expected_grads, grads, strict=True)
        ),
    ]
    largest, where = max(differences, default=(0.0, "nothing"), key=lambda pair: _rank(pair[0]))
    return Comparison(largest, where, torch.float64)


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _widened(tensor: Tensor) -> Tensor:
    own = tensor.detach().cpu()
    if own.is_complex():
        own = own.to(torch.complex128)
    elif own.is_floating_point():
        own = own.to(torch.float64)
    return (own.clone() if own is tensor else own).requires_grad_(tensor.requires_grad)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _in_torch(
    function: TensorFunction, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[tuple[int, Tensor]], list[Tensor | None]]:
    """Outputs, gradients by input position, and the weights of each output in what was differentiated."""
    leaves = [tensor.clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    with torch.enable_grad(), without_fast_paths():
        # Copies: the function may change its inputs in place.
        outputs = list(function([leaf.clone() for leaf in leaves]))
        weights = [_weights(output) if output.requires_grad else None for output in outputs]
        differentiated = [(o, w) for o, w in zip(outputs, weights, strict=True) if w is not None]
        places = [index for index, leaf in enumerate(leaves) if leaf.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(places)
        if differentiated and places:
            grads = torch.autograd.grad(
                [o for o, _ in differentiated],
                [leaves[index] for index in places],
                [w for _, w in differentiated],
                allow_unused=True,
            )
    full = [(i, torch.zeros_like(leaves[i]) if g is None else g) for i, g in zip(places, grads, strict=True)]
    return [output.detach() for output in outputs], full, weights


def _in_jax(
    translation: Translation, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    places = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
    # Gradients flow through the outputs that PyTorch differentiates, so the others are only passed on.
    differentiated = [index for index, weight in enumerate(weights) if weight is not None]

    def outputs_and_gradients(arrays: list[Any], cotangents: list[Any]) -> Any:
        def outputs(smooth: list[Any]) -> Any:
            given = list(arrays)
            for index, array in zip(places, smooth, strict=True):
                given[index] = array
            results = translation.run(given, jax.random.key(0), "native")
            return [results[index] for index in differentiated], results

        _, vjp, results = jax.vjp(outputs, [arrays[index] for index in places], has_aux=True)
        return results, vjp(cotangents)[0]

    with torch_dtypes(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        arrays = [to_jax(tensor) for tensor in inputs]
        cotangents = [to_jax(weights[index].conj()) for index in differentiated]  # type: ignore[union-attr]
        compiled = jax.jit(outputs_and_gradients).lower(arrays, cotangents).compile(compiler_options=_QUICK_COMPILE)
        results, grads = compiled(arrays, cotangents)
    return [to_torch(array) for array in results], [to_torch(grad).conj().resolve_conj() for grad in grads]


def _weights(output: Tensor) -> Tensor:
    """Fixed numbers that differ from entry to entry, so that no symmetry hides a mistake."""
    positions = torch.arange(output.numel(), device=output.device)
    return torch.sin(positions * 0.7 + 1.0).reshape(output.shape).to(output.dtype)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf
    if ours.numel() == 0 or torch.equal(ours, theirs):
        return 0.0
    if not (ours.is_floating_point() or ours.is_complex()):
        return math.inf
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    scaled = (ours - theirs).abs() / theirs.abs().clamp(min=1.0)
    return float(torch.where(same, 0.0, scaled).max())


def _without_randomness(function: TensorFunction) -> TensorFunction:
    def fixed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with _FixedNumbers():
            return function(tensors)

    return fixed


# Layers that act in training only become what they are in evaluation.
_EVALUATED = frozenset(
    (
        torch.nn.functional.dropout,
        torch.nn.functional.dropout1d,
        torch.nn.functional.dropout2d,
        torch.nn.functional.dropout3d,
        torch.nn.functional.alpha_dropout,
        torch.nn.functional.feature_alpha_dropout,
    )
)
_IDENTITY = frozenset((torch.dropout, torch.dropout_, torch.alpha_dropout, torch.feature_dropout))
_FIXED = {
    "rand": 0.25,
    "randn": 0.5,
    "rand_like": 0.25,
    "randn_like": 0.5,
    "bernoulli": 1.0,
    "bernoulli_": 1.0,
    "uniform_": 0.25,
    "normal_": 0.5,
    "exponential_": 0.75,
}


def _with_wide_arguments(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in float64: tensors that the function has caught elsewhere are in the precision they were made in."""
    first = 1 if changes_first_argument(func) else 0
    wide_args, wide_kwargs = pytree.tree_map_only(Tensor, _wide, (args[first:], kwargs))
    return (*args[:first], *wide_args), wide_kwargs


_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def _wide(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return tensor.to(_WIDE[tensor.dtype]) if tensor.dtype in _WIDE else tensor


class _FixedNumbers(TorchFunctionMode):
    """Computes in float64, and puts fixed numbers in the place of random ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _with_wide_arguments(func, args, kwargs or {})
        if func in _EVALUATED or func in _IDENTITY:
            return args[0]
        name = getattr(func, "__name__", "")
        if name in _FIXED:
            value = _FIXED[name]
            if name.endswith("_"):
                (target,) = changed_arguments(func, args, kwargs)
                return target.fill_(value)
            if name == "bernoulli" or name.endswith("_like"):
                return torch.full_like(args[0], value)
            shape = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)) else args
            kwargs.pop("generator", None)
            return torch.full(tuple(kwargs.pop("size", shape)), value, **kwargs)
        if name in ("scaled_dot_product_attention",):
            kwargs["dropout_p"] = 0.0
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        if name == "rrelu":
            kwargs["training"] = False
            args = args[:3]
        return func(*args, **kwargs)
