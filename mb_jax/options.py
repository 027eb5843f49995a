"""Options of the XLA backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from bridge.translate import available_translators
from mb_torch.errors import InvalidInput


@dataclass(frozen=True)
class JaxOptions:
    """Options of the XLA backend, given as ``ModelBatch(..., backend_options={...})``.

    Attributes:
        translator: How torch code becomes JAX code: ``"auto"`` tries ``"graph"`` (PyTorch records core operations,
            which have lowerings of our own), ``"torch2jax"`` and ``"torchax"`` in order.
        verify: Compare every translation with PyTorch in float64 before it is used, and refuse what differs.
        convolution: How convolutions of several models are computed: ``"native"`` (grouped convolutions of XLA),
            ``"matmul"`` (shifted windows and one matrix product), or ``"auto"``, which chooses by platform.

    Example:
        >>> JaxOptions.of({"verify": False}).translator
        'auto'
    """

    translator: str = "auto"
    verify: bool = True
    convolution: Literal["auto", "native", "matmul"] = "auto"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> JaxOptions:
        """Return checked options.

        Raises:
            InvalidInput: There is no such option, or no such value.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise InvalidInput("backend_options", received=f"{unknown}", expected=f"some of {names}")
        options = cls(**given)
        allowed: dict[str, list[Any]] = {
            "translator": ["auto", *available_translators()],
            "verify": [True, False],
            "convolution": ["auto", "native", "matmul"],
        }
        for name, values in allowed.items():
            if getattr(options, name) not in values:
                received = repr(getattr(options, name))
                raise InvalidInput(f"backend_options[{name!r}]", received=received, expected=f"one of {values}")
        return options
