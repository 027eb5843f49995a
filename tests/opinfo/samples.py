"""What the bridge makes of PyTorch's own samples: outputs and gradients, entry by entry.

Each sample is judged in float64, because float32 cannot tell right from nearly right. It also runs in float32, in
which dtypes and shapes must be PyTorch's and values as near as rounding lets them be.
"""

from __future__ import annotations

import functools
import math
import tomllib
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bridge.translation import Translation
from bridge.translators import translate_function
from bridge.verify import BOUND, _in_jax, _in_torch, compare
from bridge.via_graph import GraphTranslator
from mb_torch.errors import Unsupported

COMPARED, PARTLY, FORM_ONLY = "compared", "compared in part", "form only"
REFUSED, DIFFERENT, WITHOUT_SAMPLES = "refused", "different", "no samples"
PASSED = (COMPARED, PARTLY, FORM_ONLY)

MOST_SAMPLES = 3
"""As many samples are taken of each entry, spread over those that PyTorch has."""

_DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64)
"""The first of these that an entry supports is the one it is run in."""


_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class Outcome(NamedTuple):
    """What became of an entry.

    Attributes:
        status: One of the words above.
        samples: How many samples it has here.
        detail: What is wrong with the first sample that failed.
    """

    status: str
    samples: int
    detail: str = ""


@functools.cache
def entries() -> dict[str, Any]:
    """All entries of PyTorch's table, by name and variant. The table takes seconds to import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {f"{entry.name}.{entry.variant_test_name}".removesuffix("."): entry for entry in op_db}


@functools.cache
def lists() -> dict[str, dict[str, str]]:
    """Entries with a reason each: excluded, compared in part (samples that are refused are left out), form only."""
    return tomllib.loads(Path(__file__).with_name("excluded.toml").read_text(encoding="utf-8"))


class Sample:
    """One of PyTorch's samples as a function of a flat list of tensors.

    Attributes:
        inputs: The tensors it is called with.
    """

    def __init__(self, entry: Any, sample: Any) -> None:
        self._entry, self._process = entry, sample.output_process_fn_grad
        self._leaves, self._structure = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else _wide(leaf) for leaf in self._leaves]
        value, args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        result = self._process(self._entry(value, *args, **kwargs))
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _wide(leaf: Any) -> Any:
    """Where floats are 64 bits wide, a dtype that a sample asks for is, too."""
    is_wide = torch.get_default_dtype() is torch.float64
    return _WIDE.get(leaf, leaf) if is_wide and isinstance(leaf, torch.dtype) else leaf


def samples(entry: Any) -> list[Sample]:
    """A few samples, spread over those that PyTorch has for an entry; without those that it refuses itself."""
    dtype = next((dtype for dtype in _DTYPES if dtype in entry.supported_dtypes("cpu")), None)
    if dtype is None:
        return []
    torch.manual_seed(0)
    found = list(islice(entry.sample_inputs("cpu", dtype, requires_grad=_differentiable(entry, dtype)), 40))
    chosen = found
    if len(found) > MOST_SAMPLES:
        chosen = [found[place * (len(found) - 1) // (MOST_SAMPLES - 1)] for place in range(MOST_SAMPLES)]
    return [sample for sample in (_usable(Sample(entry, one)) for one in chosen) if sample is not None]


def _differentiable(entry: Any, dtype: torch.dtype) -> bool:
    return entry.supports_autograd and (dtype.is_floating_point or dtype.is_complex)


def _usable(sample: Sample) -> Sample | None:
    """The sample as PyTorch can run it: with gradients of all inputs, else of the first one, else of none."""
    for wanted in (len(sample.inputs), 1, 0):
        for place, tensor in enumerate(sample.inputs):
            tensor.requires_grad_(tensor.requires_grad and place < wanted)
        try:
            _in_torch(sample, sample.inputs)
        except (RuntimeError, NotImplementedError, ValueError):
            continue
        return sample
    return None


def check(name: str) -> Outcome:
    """Run an entry's samples through the bridge and compare them with PyTorch, up to the first that fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            own = samples(entries()[name])
        except Exception as error:
            return Outcome(WITHOUT_SAMPLES, 0, _first_line(error))
        if not own:
            return Outcome(WITHOUT_SAMPLES, 0, "PyTorch runs none of its samples on CPU")
        return _check_all(own, may_refuse=name in lists()["partly"], form_only=name in lists()["form"])


def _check_all(own: list[Sample], *, may_refuse: bool, form_only: bool) -> Outcome:
    refused = ""
    count = 0
    for sample in own:
        try:
            draws, problem = _check(sample, form_only)
        except Unsupported as error:
            refused = _first_line(error)
            if may_refuse:
                continue
            return Outcome(REFUSED, len(own), refused)
        except Exception as error:
            return Outcome(DIFFERENT, len(own), f"{type(error).__name__}: {_first_line(error)}")
        if problem:
            return Outcome(DIFFERENT, len(own), problem)
        form_only |= draws
        count += 1
    if not count:
        return Outcome(REFUSED, len(own), refused)
    return Outcome(FORM_ONLY if form_only else PARTLY if refused else COMPARED, count)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _check(sample: Sample, form_only: bool) -> tuple[bool, str]:
    """Whether a sample draws random numbers, and what is wrong with its translation."""
    translation = translate_function(sample, sample.inputs, translator="graph", verify=False).translation
    if form_only or translation.draws:
        return translation.draws, _form_problem(translation, sample)
    comparison = compare(GraphTranslator(), sample, sample.inputs)
    if not comparison.largest <= BOUND:
        return False, f"{comparison.where} differs by {comparison.largest:.1e}"
    return False, _float32_problem(translation, sample)


def _form_problem(translation: Translation, sample: Sample) -> str:
    expected = sample([tensor.detach().clone() for tensor in sample.inputs])
    outputs, _ = _in_jax(translation, [tensor.detach() for tensor in sample.inputs], [None] * len(expected))
    return next(
        (
            f"output {place} is {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}"
            for place, (ours, theirs) in enumerate(zip(outputs, expected, strict=True))
            if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape)
        ),
        "",
    )


def _float32_problem(translation: Translation, sample: Sample) -> str:
    """What is further from PyTorch's result than rounding explains, where the program runs in the sample's dtype."""
    expected, expected_grads, weights = _in_torch(sample, sample.inputs)
    outputs, grads = _in_jax(translation, sample.inputs, weights)
    theirs = [*expected, *(grad for _, grad in expected_grads)]
    for place, (ours, other) in enumerate(zip([*outputs, *grads], theirs, strict=True)):
        if (ours.dtype, ours.shape) != (other.dtype, other.shape):
            return f"result {place} is {ours.dtype} {list(ours.shape)}, not {other.dtype} {list(other.shape)}"
    excess = _excess(theirs, [*outputs, *grads], [0.0] * len(theirs))
    if excess > 0:
        # How much rounding does depends on the function and the values: PyTorch's own error is the measure of it.
        exact = _in_float64(sample)
        errors = [10 * (own.to(one.dtype) - one).abs() for own, one in zip(theirs, exact, strict=True)]
        excess = _excess(theirs, [*outputs, *grads], errors)
    return f"in single precision results differ by {excess:.1e} more than rounding explains" if excess > 0 else ""


def _excess(theirs: Sequence[Tensor], ours: Sequence[Tensor], errors: Sequence[Any]) -> float:
    """By how much the largest difference is above 2e-5 (2e-4 of large values) and the given errors."""
    largest = -math.inf
    for other, own, error in zip(theirs, ours, errors, strict=True):
        if other.is_floating_point() or other.is_complex():
            differs = ~((own == other) | (own.isnan() & other.isnan()))
            excess = (own - other).abs() - (2e-5 + 2e-4 * other.abs()) - error
            # A difference of infinities is no number.
            wrong = excess.nan_to_num(math.inf)[differs]
        else:
            wrong = (own != other)[own != other].float()
        largest = max(largest, float(wrong.max()) if wrong.numel() else -math.inf)
    return largest


def _in_float64(sample: Sample) -> list[Tensor]:
    wide = [tensor.detach().to(_WIDE.get(tensor.dtype, tensor.dtype)) for tensor in sample.inputs]
    wide = [one.requires_grad_(tensor.requires_grad) for one, tensor in zip(wide, sample.inputs, strict=True)]
    torch.set_default_dtype(torch.float64)
    try:
        outputs, grads, _ = _in_torch(sample, wide)
    finally:
        torch.set_default_dtype(torch.float32)
    return [*outputs, *(grad for _, grad in grads)]
