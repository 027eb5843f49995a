"""Honours ``torch.autocast`` under vmap.

vmap takes some operations apart before autocast sees them (``linear`` with a bias, convolutions), so their inputs would
silently stay in full precision. Within this mode the inputs of autocast's operations are cast before vmap gets them.

Source: the lists of operations in https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mb_torch.vmap.random_ops import COMPOSITES

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")

_LOWER = """
    linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc matmul __matmul__
    __rmatmul__ mm bmm mv addmm addmv addbmm baddbmm chain_matmul scaled_dot_product_attention
"""

_FULL_EVERYWHERE = """
    mse_loss nll_loss cross_entropy ctc_loss kl_div huber_loss smooth_l1_loss l1_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss multilabel_margin_loss margin_ranking_loss hinge_embedding_loss
    cosine_embedding_loss poisson_nll_loss binary_cross_entropy_with_logits prod cdist trace
"""

_FULL_ON_ACCELERATORS = """
    softmax log_softmax softmin softplus layer_norm group_norm rms_norm norm cumsum cumprod sum exp expm1 log log10 log2
    log1p pow __pow__ __rpow__ reciprocal rsqrt sinh cosh tan acos asin erfinv renorm dist cosine_similarity pdist
"""


def _functions(names: str) -> frozenset[Callable[..., Any]]:
    spaces = (torch, Tensor, functional)
    found: Iterable[Any] = (getattr(space, name, None) for name in names.split() for space in spaces)
    return frozenset(function for function in found if function is not None)


_LOWERED = _functions(_LOWER)
_KEPT_EVERYWHERE = _functions(_FULL_EVERYWHERE)
_KEPT_ON_ACCELERATORS = _functions(_FULL_ON_ACCELERATORS)


def honoured_autocast() -> AbstractContextManager[Any]:
    """Return a context in which autocast, if it is enabled, acts on functions that run under vmap.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> def run(x):
        ...     with honoured_autocast():
        ...         return layer(x)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     torch.vmap(run)(torch.ones(3, 5, 4)).dtype
        torch.bfloat16
    """
    enabled = any(torch.is_autocast_enabled(device_type) for device_type in _DEVICE_TYPES)
    return _Casting() if enabled else nullcontext()


class _Casting(TorchFunctionMode):
    """Casts the arguments of autocast's operations."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOWERED:
            args, kwargs = pytree.tree_map(_lowered, (args, kwargs))
        elif func in _KEPT_EVERYWHERE or func in _KEPT_ON_ACCELERATORS:
            everywhere = func in _KEPT_EVERYWHERE
            args, kwargs = pytree.tree_map(lambda leaf: _full(leaf, everywhere), (args, kwargs))
        elif func in COMPOSITES:
            # torch switches this mode off while it handles a call; what the function's body calls must come here too.
            with _Casting():
                return COMPOSITES[func](*args, **kwargs)
        return func(*args, **kwargs)


def _enabled(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and torch.is_autocast_enabled(leaf.device.type)


def _lowered(leaf: Any) -> Any:
    if not _enabled(leaf) or leaf.dtype == torch.float64:
        return leaf
    return leaf.to(torch.get_autocast_dtype(leaf.device.type))


def _full(leaf: Any, everywhere: bool) -> Any:
    if not _enabled(leaf) or leaf.dtype not in (torch.float16, torch.bfloat16):
        return leaf
    return leaf.float() if everywhere or leaf.device.type != "cpu" else leaf
