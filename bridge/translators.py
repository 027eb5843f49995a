"""Torch functions and modules as JAX functions that have been compared with PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from bridge.by_value import NOTHING, Knowable, translate_by_value
from bridge.taken import taken_by
from bridge.translation import TensorFunction, Translation, Translator
from bridge.verify import BOUND, Comparison, compare
from mb_torch.errors import InvalidInput, Unsupported

# In the order in which they are tried.
_TRANSLATORS = {
    "graph": "bridge.via_graph:GraphTranslator",
    "torch2jax": "bridge.via_torch2jax:Torch2JaxTranslator",
    "torchax": "bridge.via_torchax:TorchaxTranslator",
}

_compared: dict[tuple[object, ...], Comparison] = {}


class Checked(NamedTuple):
    """What has become of a torch function.

    Attributes:
        translation: The translation.
        comparison: How it compared with PyTorch; None if it was not compared.
        taken: Tensors that the function took from elsewhere, for whose values the translation was made.
    """

    translation: Translation
    comparison: Comparison | None
    taken: list[Tensor]


def available_translators() -> list[str]:
    """Names that ``translator=`` accepts, in the order in which ``"auto"`` tries them.

    Example:
        >>> available_translators()[0]
        'graph'
    """
    return list(_TRANSLATORS)


def translate_function(
    function: TensorFunction,
    inputs: Sequence[Tensor],
    modules: Sequence[nn.Module] = (),
    *,
    translator: str = "auto",
    verify: bool = True,
    knowable: Knowable = NOTHING,
) -> Checked:
    """Translate a torch function of a flat sequence of tensors.

    Args:
        function: Takes and returns flat sequences of tensors; it may change its inputs in place and return them.
        inputs: Real inputs. The translation serves inputs of these shapes, dtypes and ``requires_grad``.
        modules: Modules that the function calls, for names in errors.
        translator: A name from `available_translators`, or ``"auto"`` to try all in order.
        verify: Compare outputs, gradients and changed tensors with PyTorch in float64 and refuse what differs by more
            than 1e-9. What has been compared once is not compared again.
        knowable: Inputs whose values the translation may be made for, where the function looks at them.

    Raises:
        Unsupported: No translator can, or none agrees with PyTorch; lists the reason of each.

    Example:
        >>> checked = translate_function(lambda inputs: [inputs[0].sin()], [torch.ones(3)])
        >>> checked.translation.translator, checked.comparison.largest < 1e-15
        ('graph', True)
    """
    if translator != "auto" and translator not in _TRANSLATORS:
        raise InvalidInput("translator", received=repr(translator), expected=f"'auto' or one of {list(_TRANSLATORS)}")
    taken = taken_by(function, inputs)
    refused = []
    for name in _TRANSLATORS if translator == "auto" else [translator]:
        try:
            own = _load(name)
            translation = translate_by_value(own, function, inputs, modules, knowable)
            comparison = _comparison(own, translation, function, inputs, modules) if verify else None
        except Unsupported as error:
            refused.append((name, error))
            continue
        if comparison is None or comparison.largest <= BOUND:
            return Checked(translation, comparison, taken)
        reason = f"differs from PyTorch by {comparison.largest:.1e} in {comparison.where}"
        refused.append((name, Unsupported(reason)))
    (_, first), *others = refused
    if not others:
        raise first
    lines = [f"{name}: {str(reason).removeprefix(name).lstrip(' :')}" for name, reason in others]
    # The first is our own, whose reason says most about the function.
    raise Unsupported("\n  ".join([f"no translation to JAX: {first.problem}", *lines]), fix=first.fix)


def _comparison(
    translator: Translator,
    translation: Translation,
    function: TensorFunction,
    inputs: Sequence[Tensor],
    modules: Sequence[nn.Module],
) -> Comparison:
    key = (
        translator.name,
        translation.text,
        tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs),
    )
    if not translation.text or key not in _compared:
        _compared[key] = compare(translator, function, inputs, modules, translation.known)
    return _compared[key]


def _load(name: str) -> Translator:
    module, _, attribute = _TRANSLATORS[name].partition(":")
    translator: Translator = getattr(importlib.import_module(module), attribute)()
    return translator
