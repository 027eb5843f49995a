"""Options of the XLA backend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from bridge.translators import available_translators
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
        devices: Over how many devices the models are spread; see `mb_jax.sharding.layout_for`. ``chunk_size`` counts
            the models of one device. Models with different numbers of rows run on one device.
        cache_dir: A folder for compiled programs, for this and later runs; see `mb_jax.start.use_cache`. Default:
            ``$MODELBATCH_JAX_CACHE``, else none.

    Example:
        >>> JaxOptions.of({"verify": False}).translator
        'auto'
    """

    translator: str = "auto"
    verify: bool = True
    convolution: Literal["auto", "native", "matmul"] = "auto"
    devices: int | Literal["all"] | None = None
    cache_dir: str | os.PathLike[str] | None = None

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
        devices = options.devices
        if devices not in (None, "all") and not (type(devices) is int and devices >= 1):
            raise InvalidInput(
                "backend_options['devices']", received=repr(devices), expected="a positive integer, 'all' or None"
            )
        if not isinstance(options.cache_dir, str | os.PathLike | None):
            raise InvalidInput("backend_options['cache_dir']", received=repr(options.cache_dir), expected="a path")
        return options
