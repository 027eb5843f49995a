"""Attention layers kept off torch's inference fast path, which vmap can neither batch nor differentiate.

In evaluation torch swaps these layers for fused kernels when it believes that no gradient is wanted; a batched tensor
always makes it believe so. The ordinary path computes the same, except that the fast path of a whole encoder
puts zeros where the padding mask says that a row has ended: that is reproduced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mb_torch.vmap.functorch_state import needs_gradient, under_vmap


class BatchableMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that also runs under vmap in evaluation."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; as in `torch.nn.MultiheadAttention`."""
        if not under_vmap() or not self._may_take_fast_path(query, key, value):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        sequence = query.transpose(0, 1)
        output, weights = F.multi_head_attention_forward(
            sequence,
            sequence,
            sequence,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            None,
            None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out_proj.weight,
            out_proj_bias=self.out_proj.bias,
            training=False,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return output.transpose(0, 1), weights

    def _may_take_fast_path(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """The conditions of the fast path that do not depend on gradients and masks."""
        plain = self.bias_k is None and self.bias_v is None and not self.add_zero_attn
        same = query is key and key is value and self.in_proj_weight is not None
        return plain and same and query.dim() == 3 and self.batch_first and not self.training


class BatchableTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` that also runs under vmap in evaluation."""

    @property
    def activation_relu_or_gelu(self) -> int:  # type: ignore[override]
        """Which activation the fast path may fuse; none (0) under vmap, which rules the fast path out."""
        return 0 if under_vmap() else self.__dict__["activation_relu_or_gelu"]


class BatchableTransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` that also runs under vmap in evaluation."""

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        """Whether rows of different length may be run as a nested tensor; never under vmap."""
        return False if under_vmap() else self.__dict__["use_nested_tensor"]

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Encode; as in `torch.nn.TransformerEncoder`."""
        if not under_vmap() or mask is not None or src_key_padding_mask is None or not self._would_nest(src):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        output = src
        for layer in self.layers:
            output = layer(output, src_key_padding_mask=src_key_padding_mask)
        padded = src_key_padding_mask != 0
        # torch only takes this path if each row's padding is at its end.
        padded_at_end = (padded.to(torch.int8).diff(dim=1) >= 0).all()
        output = output.masked_fill((padded & padded_at_end).unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _would_nest(self, src: Tensor) -> bool:
        """Whether one model alone would take the fast path, given a padding mask that permits it."""
        if not self.__dict__["use_nested_tensor"] or self.layers[0].training or src.dim() != 3:
            return False
        if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
            return False
        if torch.compiler.is_compiling():
            return not self.mask_check and not torch.is_grad_enabled()
        first = [src, *self.layers[0].parameters()]
        return not (torch.is_grad_enabled() and any(needs_gradient(tensor) for tensor in first))
