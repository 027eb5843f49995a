"""How torch functions run on mirrors, and which of them read or write a mirror's values.

Every function that is not listed here counts as both, so a function that is missing costs time, no more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


def _getters(names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names.split() if hasattr(Tensor, name)}


def _setters(names: str) -> set[Any]:
    return {getattr(Tensor, name).__set__ for name in names.split()}


def _functions(owner: Any, names: str) -> set[Any]:
    return {getattr(owner, name) for name in names.split() if hasattr(owner, name)}


# What neither reads nor writes values. `size` and `dim` are missing on purpose: torch.vmap asks for them and then
# takes the values without asking. `data_ptr` is here because PerModelOptimizer compares it at every step.
METADATA: frozenset[Any] = frozenset(
    _getters(
        "shape dtype device layout ndim names itemsize nbytes requires_grad is_leaf grad grad_fn grad_dtype output_nr "
        "retains_grad _version _backward_hooks _post_accumulate_grad_hooks "
        "is_cpu is_cuda is_ipu is_maia is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse "
        "is_sparse_csr is_vulkan is_xla is_xpu"
    )
    | _setters("grad requires_grad grad_dtype _backward_hooks _post_accumulate_grad_hooks")
    | _functions(
        Tensor,
        "numel nelement element_size stride storage_offset data_ptr get_device is_complex is_conj is_contiguous "
        "is_floating_point is_inference is_neg is_pinned is_same_size is_shared is_signed has_names _is_view "
        "requires_grad_ retain_grad register_hook register_post_accumulate_grad_hook __len__ __hash__ "
        "__dlpack_device__ new_empty new_ones new_zeros",
    )
    | _functions(
        torch,
        "numel is_complex is_conj is_floating_point is_inference is_neg is_same_size is_signed result_type "
        "empty_like ones_like rand_like randint_like randn_like zeros_like "
        "_has_compatible_shallow_copy_type",
    )
)

# What reads values and returns nothing that shares memory with them.
READS: frozenset[Any] = frozenset(
    _functions(
        Tensor,
        "clone equal item tolist __bool__ __float__ __int__ __complex__ __format__ __repr__ __eq__ __ne__ eq ne "
        "new_full",
    )
    | _functions(torch, "clone equal allclose isclose isfinite isnan eq ne full_like")
)

_PLAIN = torch._C.DisableTorchFunctionSubclass


class Synced(Protocol):
    """What a mirror does before and after torch uses its values."""

    def pull(self) -> None:
        """Bring torch's values up to date."""

    def touch(self) -> None:
        """Take note that torch may have written."""


class Mirrored:
    """A tensor class whose values are those of a mirror. What torch functions return are plain tensors."""

    @abstractmethod
    def _mirror(self) -> Synced:
        """Return the mirror that is used when this tensor is."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return call(func, args, kwargs or {})


def call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a torch function on mirrors that are up to date, and tell those that may have been written to."""
    if func in METADATA:
        with _PLAIN():
            return func(*args, **kwargs)
    if func is torch.autograd.grad:
        return _autograd_grad(*args, **kwargs)
    mirrors = [*_mirrors_in(args), *_mirrors_in(kwargs.values())]
    for mirror in mirrors:
        mirror.pull()
    try:
        with _PLAIN():
            if func is Tensor.__dlpack__ and not args[0].requires_grad:
                # It would export the tensor itself; an alias of it is counted as long as the export lives.
                args = (args[0].detach(), *args[1:])
            return func(*args, **kwargs)
    finally:
        if func not in READS or "out" in kwargs:
            for mirror in mirrors:
                mirror.touch()


def _mirrors_in(values: Iterable[Any]) -> Iterator[Synced]:
    for value in values:
        if isinstance(value, Mirrored):
            yield value._mirror()
        elif isinstance(value, (list, tuple)):
            yield from _mirrors_in(value)
        elif isinstance(value, dict):
            yield from _mirrors_in(value.values())


def _autograd_grad(
    outputs: Iterable[Any], inputs: Iterable[Any], *, materialize_grads: bool = False, **kwargs: Any
) -> tuple[Any, ...]:
    """``torch.autograd.grad`` with the mirrors out of its sight.

    Whatever backward passes in Python it runs would otherwise take mirrors for plain tensors.
    """
    inputs = tuple(inputs)
    grads = torch.autograd.grad([*map(_edge_of, outputs)], [*map(_edge_of, inputs)], **kwargs)
    if not materialize_grads:
        return grads
    create_graph = bool(kwargs.get("create_graph"))
    return tuple(
        torch.zeros_like(given, requires_grad=create_graph) if grad is None else grad
        for given, grad in zip(inputs, grads, strict=True)
    )


def _edge_of(value: Any) -> Any:
    """Where gradients for a mirror arrive in the graph; other values as they are."""
    if not isinstance(value, Mirrored):
        return value
    with _PLAIN():
        return torch.autograd.graph.get_gradient_edge(value)  # type: ignore[arg-type]
