"""Rules that ``torch.vmap`` lacks for single operations, beside those that layers.py closes for whole layers.

Without a rule vmap runs an operation model by model (and warns of it) or refuses. The rules are registered once for
the process, and only where torch has none: nothing that works is replaced (the exceptions: embedding, which is wrong in
torch, and linear, which is slow). They are of two kinds: an operation written in terms of others that vmap knows, and
an operation with a row axis whose rows from all models are run as one long batch.

Source: "Writing batching rules", https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/functorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils import _pytree as pytree

from mb_torch.vmap.linear import linear

_KEY = "FuncTorchBatched"
_registry = torch.library.Library("aten", "IMPL")


def _rule(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what vmap does for ``aten::name``, unless torch does it already."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", _KEY):
            _registry.impl(name, function, _KEY)
        return function

    return register


@_rule("div.out")
def _divide_into(self: Tensor, other: Tensor, *, out: Tensor) -> Tensor:
    # spectral_norm normalises its vectors into the buffers that hold them.
    return out.copy_(torch.div(self, other))


@_rule("lerp_.Scalar")
def _interpolate_in_place(self: Tensor, end: Tensor, weight: float) -> Tensor:
    return self.copy_(torch.lerp(self, end, weight))


@_rule("index_copy_")
def _copy_rows_in_place(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return self.copy_(torch.index_copy(self, dim, index, source))


@_rule("tril_")
def _lower_triangle_in_place(self: Tensor, diagonal: int = 0) -> Tensor:
    return self.copy_(self.tril(diagonal))


@_rule("embedding_renorm_")
def _shorten_rows(self: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    rows = torch.embedding(self, indices)
    norms = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    # The constant is the one that torch adds; a row that occurs twice is written twice with the same values.
    shortened = torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows)
    return self.index_put_((indices,), shortened)


def _norms_but(v: Tensor, dim: int) -> Tensor:
    """The norms of a tensor over all axes but ``dim`` (-1: over all), kept for broadcasting."""
    axes = [axis for axis in range(v.dim()) if axis != dim]
    return torch.linalg.vector_norm(v, dim=axes, keepdim=True)


@_rule("_weight_norm")
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / _norms_but(v, dim))


@_rule("_weight_norm_interface")
def _weight_norm_and_norms(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norms = _norms_but(v, dim)
    return v * (g / norms), norms


@_rule("_weight_norm_interface_backward")
def _weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(v.dim()) if axis != dim]
    along = (grad * v).sum(axes, keepdim=True) / norms
    return (g / norms) * (grad - v * (along / norms)), along


@_rule("_native_batch_norm_legit_no_training")
def _normalise_by_running_statistics(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # The compiler's form of batch_norm in evaluation; the last two results are the statistics of the batch.
    def along(channels: Tensor) -> Tensor:
        return channels.view(-1, *[1] * (input.dim() - 2))

    scale = torch.rsqrt(running_var + eps)
    outputs = (input - along(running_mean)) * along(scale if weight is None else scale * weight)
    none = input.new_zeros(0)
    return (outputs if bias is None else outputs + along(bias)), none, none


def _places(batch_sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The time step and the row of each entry of a packed sequence."""
    sizes = torch.tensor(batch_sizes)
    times = torch.arange(len(batch_sizes)).repeat_interleave(sizes)
    rows = torch.cat([torch.arange(size) for size in batch_sizes])
    return times, rows


@_rule("_pack_padded_sequence")
def _pack(sequences: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    if batch_first:
        sequences = sequences.transpose(0, 1)
    batch_sizes = (lengths > torch.arange(int(lengths[0])).unsqueeze(1)).sum(1)
    times, rows = _places(batch_sizes.tolist())
    return sequences[times.to(sequences.device), rows.to(sequences.device)], batch_sizes


@_rule("_pad_packed_sequence")
def _unpack(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int = -1
) -> tuple[Tensor, Tensor]:
    sizes = batch_sizes.tolist()
    times, rows = _places(sizes)
    steps = max(len(sizes), total_length)
    padded = data.new_full((steps, sizes[0], *data.shape[1:]), padding_value)
    padded = padded.index_put((times.to(data.device), rows.to(data.device)), data)
    lengths = torch.bincount(rows, minlength=sizes[0])
    return (padded.transpose(0, 1) if batch_first else padded), lengths


def _merged(operation: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Run an operation once on the rows of all models.

    Args:
        operation: Takes the tensors; the first axis of each tensor that it takes or returns is that of the rows.
        tensors: What it takes for one model.

    Returns:
        What it returns, for one model.
    """
    level = retrieve_current_functorch_interpreter().level()
    pairs = [(None, None) if tensor is None else _functorch._unwrap_batched(tensor, level) for tensor in tensors]
    num_models = next(tensor.shape[axis] for tensor, axis in pairs if tensor is not None and axis is not None)

    def merge(tensor: Tensor | None, axis: int | None) -> Tensor | None:
        if tensor is None:
            return None
        stacked = tensor.expand(num_models, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        return stacked.flatten(0, 1)

    def separate(tensor: Tensor) -> Tensor:
        return _functorch._add_batch_dim(tensor.unflatten(0, (num_models, -1)), 0, level)

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)):
        result = operation(*(merge(*pair) for pair in pairs))
        return pytree.tree_map(separate, result)


def _look_up(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """Embedding whose padding row gets no gradient in any model.

    torch's own rule joins the tables of all models to one and moves the indices, but not ``padding_idx``: where
    indices are per model, only model 0's padding row would be left alone.
    """
    if padding_idx >= 0:
        is_padding = torch.arange(weight.shape[0], device=weight.device).unsqueeze(1) == padding_idx
        weight = torch.where(is_padding, weight.detach(), weight)
    level = retrieve_current_functorch_interpreter().level()
    table, table_axis = _functorch._unwrap_batched(weight, level)
    places, places_axis = _functorch._unwrap_batched(indices, level)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)):
        if table_axis is None:
            assert places_axis is not None  # vmap calls a rule only where something is per model
            if not scale_grad_by_freq:
                rows = torch.embedding(table, places)
                return _functorch._add_batch_dim(rows, places_axis, level)
            # Each model counts its own indices.
            table, table_axis = table.expand(places.shape[places_axis], *table.shape), 0
        table = table.movedim(table_axis, 0)
        num_models, num_rows = table.shape[:2]
        if places_axis is None:
            side_by_side = table.transpose(0, 1).flatten(1)
            rows = torch.embedding(side_by_side, places, -1, scale_grad_by_freq)
            return _functorch._add_batch_dim(rows.unflatten(-1, (num_models, -1)), places.dim(), level)
        places = places.movedim(places_axis, 0)
        first_rows = torch.arange(num_models, device=places.device).view(-1, *[1] * (places.dim() - 1)) * num_rows
        rows = torch.embedding(table.flatten(0, 1), places + first_rows, -1, scale_grad_by_freq)
        return _functorch._add_batch_dim(rows, 0, level)


def _split_mask(mask: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """An attention mask as one that has rows of its own, or as one that all rows of all models share."""
    if mask is None:
        return None, None
    if mask.dim() == 2:
        mask = mask.unsqueeze(0).unsqueeze(0)
    if mask.shape[0] == 1 and not _functorch.is_batchedtensor(mask):
        return None, mask
    return mask.expand(rows, *mask.shape[1:]), None


@_rule("_scaled_dot_product_flash_attention_for_cpu")
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    own, shared = _split_mask(attn_mask, query.shape[0])

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = shared if mask is None else mask
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )

    return _merged(run, query, key, value, own)


@_rule("_scaled_dot_product_flash_attention_for_cpu_backward")
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    own, shared = _split_mask(attn_mask, query.shape[0])

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *rest, mask = tensors
        mask = shared if mask is None else mask
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *rest, dropout_p, is_causal, attn_mask=mask, scale=scale
        )

    return _merged(run, grad, query, key, value, out, logsumexp, own)


@_rule("max_unpool2d")
def _unpool(self: Tensor, indices: Tensor, output_size: list[int]) -> Tensor:
    def run(values: Tensor, places: Tensor) -> Tensor:
        return torch.ops.aten.max_unpool2d(values, places, output_size)

    return _merged(run, self, indices)


@_rule("fractional_max_pool2d")
def _pool_fractionally(
    self: Tensor, kernel_size: list[int], output_size: list[int], random_samples: Tensor
) -> tuple[Tensor, Tensor]:
    def run(images: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.fractional_max_pool2d(images, kernel_size, output_size, samples)

    if self.dim() == 4:
        return _merged(run, self, random_samples)
    pooled, indices = _merged(run, self.unsqueeze(0), random_samples)
    return pooled.squeeze(0), indices.squeeze(0)


with warnings.catch_warnings():
    # torch warns of every rule that replaces one of its own.
    warnings.simplefilter("ignore")
    _registry.impl("embedding", _look_up, _KEY, allow_override=True)
    # torch takes linear apart at this key, before vmap sees it.
    _registry.impl("linear", linear, "FuncTorchDynamicLayerFrontMode", allow_override=True)
