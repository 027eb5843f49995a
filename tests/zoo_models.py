"""The zoo's whole models, small."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """A ResNet block with a projection shortcut."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class SqueezeExcite(nn.Module):
    """Channels reweighted by a small network on their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2, 1), nn.SiLU(), nn.Conv2d(2, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class SmallUNet(nn.Module):
    """Two scales with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.SiLU())
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.bottom(skip))], dim=1))


class MixerBlock(nn.Module):
    """MLP-Mixer: mixes tokens, then channels."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.token_mlp = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.channel_mlp = nn.Sequential(nn.Linear(channels, 8), nn.GELU(), nn.Linear(8, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class CausalBlock(nn.Module):
    """A GPT block: fused query-key-value projection, causal scaled dot product attention, MLP."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        self.fused = fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril(), persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
            scores = scores.masked_fill(~self.mask[:length, :length], float("-inf"))
            y = scores.softmax(-1) @ v
        return self.project(y.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallGPT(nn.Module):
    """Token and position embeddings, causal blocks, tied head."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Embedding(8, 8)
        self.blocks = nn.ModuleList([CausalBlock(8, 2, fused) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class EncoderForClassification(nn.Module):
    """In the style of Hugging Face: additive attention mask, pooled first token, keyword inputs, dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(12, 8, padding_idx=0)
        self.position = nn.Embedding(8, 8)
        self.register_buffer("position_ids", torch.arange(8).unsqueeze(0), persistent=False)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.output = nn.Linear(8, 8)
        self.output_norm = nn.LayerNorm(8, eps=1e-6)
        self.pooler = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 12)
        self.decoder.weight = self.word.weight

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 2, 4).permute(0, 2, 1, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.norm(self.word(input_ids) + self.position(self.position_ids[:, : input_ids.shape[1]]))
        scores = torch.einsum("bhqd,bhkd->bhqk", self.split(self.query(x)), self.split(self.key(x))) / 2.0
        if attention_mask is not None:
            scores = scores + (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), self.split(self.value(x)))
        mixed = mixed.permute(0, 2, 1, 3).flatten(2)
        hidden = self.output_norm(x + self.output(mixed))
        return {"logits": self.decoder(hidden), "pooled": torch.tanh(self.pooler(hidden[:, 0]))}


class RecurrentLanguageModel(nn.Module):
    """Embedding, two LSTM layers, tied decoder; returns its state for the next chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.lstm = nn.LSTM(6, 6, num_layers=2)
        self.decoder = nn.Linear(6, 10)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, state = self.lstm(self.embedding(tokens))
        return self.decoder(hidden), state


class VariationalAutoencoder(nn.Module):
    """Samples its latent code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.decoder = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code), mean, log_variance


class GumbelRouter(nn.Module):
    """Experts chosen by a sampled soft one-hot code."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 2) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weights = F.gumbel_softmax(self.router(x), tau=1.0, dim=-1)
        return torch.einsum("be,beo->bo", weights, torch.stack([expert(x) for expert in self.experts], dim=1))


class HyperNetwork(nn.Module):
    """One network writes the weights of another, one set per row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.writer = nn.Linear(2, 4 * 3)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return torch.bmm(x.unsqueeze(1), self.writer(code).view(-1, 4, 3)).squeeze(1)


class GraphConvolution(nn.Module):
    """Two rounds of message passing: a dense product, then an index_add over an edge list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(nodes))
        source, target = edges
        messages = torch.zeros_like(hidden).index_add(0, target, hidden[source])
        return self.second(hidden + messages)


class Highway(nn.Module):
    """Layers whose gate lets the input through."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.gate = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for transform, gate in zip(self.transform, self.gate, strict=True):
            opening = torch.sigmoid(gate(x))
            x = opening * F.relu(transform(x)) + (1 - opening) * x
        return x


class VectorQuantizer(nn.Module):
    """Nearest code with a straight-through gradient, argmin and a one-hot product."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.codes = nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        index = torch.cdist(z, self.codes.weight).argmin(-1)
        nearest = self.codes(index)
        return z + (nearest - z).detach(), nearest - z.detach()


class WaveBlock(nn.Module):
    """A dilated causal convolution with gated activation."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((4, 0), 0.0)
        self.filter = nn.Conv1d(3, 3, 3, dilation=2)
        self.gate = nn.Conv1d(3, 3, 3, dilation=2)
        self.mix = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = self.pad(x)
        return x + self.mix(torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded)))


class DeepSet(nn.Module):
    """Permutation invariant: embeds each element, pools, embeds again."""

    def __init__(self) -> None:
        super().__init__()
        self.element = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4))
        self.whole = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        elements = self.element(x)
        return self.whole(torch.cat([elements.mean(1), elements.logsumexp(1)], dim=-1))


class SmallViT(nn.Module):
    """Patches by a convolution, a class token, an encoder layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.encoder = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])
