"""The zoo: one table of small modules that every backend and every parity test runs.

It holds every layer family of torch.nn that has parameters or buffers, the layers that only pass gradients on
(behind a layer that trains), and the structures found in training scripts. Modules of
our own are in `tests.zoo_structures` and `tests.zoo_models`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, rnn
from torch.utils import _pytree as pytree

from tests import zoo_models as models
from tests import zoo_structures as own

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One module of the zoo.

    Attributes:
        name: Unique, fit for a test id.
        make: Builds a fresh module from torch's global generator, in the default dtype.
        inputs: `(args, kwargs)` of one batch that all models share; floats follow the default dtype.
        training: The mode the module is run in.
        random: Whether a forward pass draws random numbers, so that values cannot be compared with a loop.
        loops: Why the module can only be run one model after another; None where it is vectorised.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[Generator], Inputs]
    training: bool = True
    random: bool = False
    loops: str | None = None

    def build(self, seed: int) -> nn.Module:
        """Build the module from a seed, in its mode, leaving the global generator as it was."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            # Old-style weight_norm is deprecated, and part of the zoo because scripts use it.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True", category=UserWarning)
            return self.make().train(self.training)

    def batch(self, seed: int = 0) -> Inputs:
        """The inputs drawn from a seed."""
        return self.inputs(torch.Generator().manual_seed(seed))

    def __repr__(self) -> str:
        return self.name


def zoo_loss(outputs: Any) -> Tensor:
    """A smooth scalar of any pytree: per float leaf a fixed weighted mean, plus half the mean square.

    The weights are a function of the position alone, so that no symmetry hides a swapped or repeated entry.
    """
    total = None
    for leaf in pytree.tree_leaves(outputs):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            continue
        flat = leaf.reshape(-1)
        weights = torch.sin(torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype) * 0.7 + 1.0)
        value = (flat * weights).mean() + 0.5 * flat.square().mean()
        total = value if total is None else total + value
    assert total is not None, "no output to learn from"
    return total


def real(*shape: int) -> Callable[[Generator], Inputs]:
    """One standard normal input."""
    return lambda generator: ((torch.randn(shape, generator=generator),), {})


def ids(high: int, *shape: int) -> Callable[[Generator], Inputs]:
    """One integer input below `high`."""
    return lambda generator: ((torch.randint(high, shape, generator=generator),), {})


def both(*makers: Callable[[Generator], Inputs]) -> Callable[[Generator], Inputs]:
    """The positional inputs of several makers, one after another."""
    return lambda generator: (tuple(value for maker in makers for value in maker(generator)[0]), {})


def fixed(*values: Any) -> Callable[[Generator], Inputs]:
    """Inputs that do not depend on the generator."""
    return lambda generator: (values, {})


def named(**makers: Callable[[Generator], Inputs]) -> Callable[[Generator], Inputs]:
    """Keyword inputs."""
    return lambda generator: ((), {name: maker(generator)[0][0] for name, maker in makers.items()})


def join(first: Callable[[Generator], Inputs], second: Callable[[Generator], Inputs]) -> Callable[[Generator], Inputs]:
    """Positional inputs of the first maker, keyword inputs of the second."""
    return lambda generator: (first(generator)[0], second(generator)[1])


def after(layer: nn.Module, *rest: nn.Module) -> nn.Sequential:
    """A chain, so that something trains in front of a layer without parameters."""
    return nn.Sequential(layer, *rest)


def frozen(module: nn.Module) -> nn.Module:
    """The module with every parameter frozen."""
    return module.requires_grad_(False)


def parametrized(module: nn.Module, name: str, *parametrizations_: nn.Module) -> nn.Module:
    """The module with parametrizations registered one on top of the other."""
    for parametrization in parametrizations_:
        parametrize.register_parametrization(module, name, parametrization)
    return module


def padding(*lengths: int) -> Tensor:
    """A padding mask `[rows, longest]`: True where a row has ended."""
    return torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)


def packed_inputs(generator: Generator) -> Inputs:
    """A PackedSequence of four sequences, features 3."""
    rows = torch.randn(4, 5, 3, generator=generator)
    return (rnn.pack_padded_sequence(rows, torch.tensor([2, 5, 1, 4]), batch_first=True, enforce_sorted=False),), {}


def conv1(out: int = 4) -> nn.Conv1d:
    """What trains in front of a layer for signals, input `[4, 2, 8]`."""
    return nn.Conv1d(2, out, 3, padding=1)


def conv2(out: int = 4) -> nn.Conv2d:
    """What trains in front of a layer for images, input `[4, 2, 6, 6]`."""
    return nn.Conv2d(2, out, 3, padding=1)


def conv3(out: int = 3) -> nn.Conv3d:
    """What trains in front of a layer for volumes, input `[2, 2, 4, 4, 4]`."""
    return nn.Conv3d(2, out, 3, padding=1)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    """A small encoder layer without dropout."""
    return nn.TransformerEncoderLayer(**{"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, **options})


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    """A small decoder layer without dropout."""
    return nn.TransformerDecoderLayer(**{"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, **options})


ROW, SIGNAL, IMAGE, VOLUME = real(6, 4), real(4, 2, 8), real(4, 2, 6, 6), real(2, 2, 4, 4, 4)
SEQUENCE, TOKENS = real(5, 3, 4), real(3, 5, 8)
_ENDED = (5, 3, 4)

LINEAR = [
    Case("linear", lambda: nn.Linear(4, 3), ROW),
    Case("linear_no_bias", lambda: nn.Linear(4, 3, bias=False), ROW),
    Case("linear_one_row", lambda: nn.Linear(4, 3), real(4)),
    Case("linear_sequence", lambda: nn.Linear(4, 3), real(2, 5, 4)),
    Case("bilinear", lambda: nn.Bilinear(4, 3, 2), both(real(5, 4), real(5, 3))),
    Case("bilinear_no_bias", lambda: nn.Bilinear(4, 3, 2, bias=False), both(real(5, 4), real(5, 3))),
    Case("mlp", lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), ROW),
    Case("identity_head", lambda: nn.Sequential(nn.Linear(4, 3), nn.Identity()), ROW),
    Case("activations", own.Activations, ROW),
    Case("prelu", lambda: after(nn.Linear(4, 4), nn.PReLU()), ROW),
    Case("prelu_channels", lambda: after(conv2(), nn.PReLU(4)), IMAGE),
]

CONVOLUTION = [
    Case("conv1d", lambda: nn.Conv1d(2, 3, 3), SIGNAL),
    Case("conv1d_circular_stride", lambda: nn.Conv1d(2, 3, 3, 2, padding=1, padding_mode="circular"), SIGNAL),
    Case("conv1d_unbatched", lambda: nn.Conv1d(2, 3, 3), real(2, 8)),
    Case("conv2d", lambda: nn.Conv2d(2, 3, 3), IMAGE),
    Case("conv2d_no_bias_same", lambda: nn.Conv2d(2, 3, 3, padding="same", bias=False), IMAGE),
    Case("conv2d_stride_dilation", lambda: nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2), IMAGE),
    Case("conv2d_groups", lambda: nn.Conv2d(2, 4, 3, groups=2), IMAGE),
    Case("conv2d_reflect", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    Case("conv2d_replicate", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), IMAGE),
    Case("conv2d_rectangular", lambda: nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 1)), IMAGE),
    Case("conv2d_separable", lambda: after(nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Conv2d(2, 4, 1)), IMAGE),
    Case("conv3d", lambda: nn.Conv3d(2, 3, 3), VOLUME),
    Case("conv3d_stride_groups", lambda: nn.Conv3d(2, 4, 3, stride=2, padding=1, groups=2), VOLUME),
    Case("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), SIGNAL),
    Case("conv_transpose2d", lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), IMAGE),
    Case("conv_transpose2d_groups", lambda: nn.ConvTranspose2d(2, 4, 3, groups=2, dilation=2), IMAGE),
    Case("conv_transpose3d", lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), VOLUME),
]

NORMALISATION = [
    Case("batch_norm1d", lambda: after(nn.Linear(4, 4), nn.BatchNorm1d(4)), ROW),
    Case("batch_norm1d_signal", lambda: after(conv1(), nn.BatchNorm1d(4)), SIGNAL),
    Case("batch_norm1d_on_input", lambda: after(nn.BatchNorm1d(4), nn.Linear(4, 3)), ROW),
    Case("batch_norm2d", lambda: after(conv2(), nn.BatchNorm2d(4)), IMAGE),
    Case("batch_norm2d_eval", lambda: after(conv2(), nn.BatchNorm2d(4)), IMAGE, training=False),
    Case("batch_norm2d_no_affine", lambda: after(conv2(), nn.BatchNorm2d(4, affine=False)), IMAGE),
    Case("batch_norm2d_untracked", lambda: after(conv2(), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE),
    Case(
        "batch_norm2d_untracked_eval",
        lambda: after(conv2(), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
        training=False,
    ),
    Case("batch_norm1d_cumulative", lambda: after(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)), ROW),
    Case("batch_norm2d_cumulative", lambda: after(conv2(), nn.BatchNorm2d(4, momentum=None)), IMAGE),
    Case(
        "batch_norm2d_cumulative_eval",
        lambda: after(conv2(), nn.BatchNorm2d(4, momentum=None)),
        IMAGE,
        training=False,
    ),
    Case(
        "batch_norm2d_cumulative_untracked",
        lambda: after(conv2(), nn.BatchNorm2d(4, momentum=None, track_running_stats=False)),
        IMAGE,
    ),
    Case("batch_norm3d", lambda: after(conv3(), nn.BatchNorm3d(3)), VOLUME),
    Case("batch_norm3d_cumulative", lambda: after(conv3(), nn.BatchNorm3d(3, momentum=None, affine=False)), VOLUME),
    Case("instance_norm1d", lambda: after(conv1(), nn.InstanceNorm1d(4, affine=True)), SIGNAL),
    Case("instance_norm2d", lambda: after(conv2(), nn.InstanceNorm2d(4)), IMAGE),
    Case(
        "instance_norm2d_tracked",
        lambda: after(conv2(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        IMAGE,
    ),
    Case(
        "instance_norm2d_tracked_eval",
        lambda: after(conv2(), nn.InstanceNorm2d(4, track_running_stats=True)),
        IMAGE,
        training=False,
    ),
    Case("instance_norm3d", lambda: after(conv3(), nn.InstanceNorm3d(3, track_running_stats=True)), VOLUME),
    Case("layer_norm", lambda: after(nn.Linear(4, 5), nn.LayerNorm(5)), ROW),
    Case("layer_norm_no_bias", lambda: after(nn.Linear(4, 5), nn.LayerNorm(5, bias=False)), ROW),
    Case("layer_norm_no_affine", lambda: after(nn.Linear(4, 5), nn.LayerNorm(5, elementwise_affine=False)), ROW),
    Case("layer_norm_two_axes", lambda: after(conv1(), nn.LayerNorm((4, 8))), SIGNAL),
    Case("group_norm", lambda: after(conv2(), nn.GroupNorm(2, 4)), IMAGE),
    Case("group_norm_no_affine", lambda: after(conv2(), nn.GroupNorm(4, 4, affine=False)), IMAGE),
    Case("rms_norm", lambda: after(nn.Linear(4, 5), nn.RMSNorm(5)), ROW),
    Case("local_response_norm", lambda: after(conv2(), nn.LocalResponseNorm(2)), IMAGE),
    Case("cross_map_lrn", lambda: after(conv2(), nn.CrossMapLRN2d(3)), IMAGE, loops="an autograd.Function of its own"),
]

EMBEDDING = [
    Case("embedding", lambda: nn.Embedding(7, 4), ids(7, 3, 5)),
    Case("embedding_padding", lambda: nn.Embedding(7, 4, padding_idx=2), ids(7, 3, 5)),
    Case("embedding_scaled_by_frequency", lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), ids(7, 3, 5)),
    Case("embedding_max_norm", lambda: after(nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 3)), ids(7, 3, 5)),
    Case("embedding_max_norm_l1", lambda: nn.Embedding(7, 4, padding_idx=0, max_norm=1.0, norm_type=1.0), ids(7, 6)),
    Case(
        "embedding_pretrained",
        lambda: after(nn.Embedding.from_pretrained(torch.randn(7, 4)), nn.Linear(4, 3)),
        ids(7, 3, 5),
    ),
    Case("embedding_bag_mean", lambda: nn.EmbeddingBag(7, 4), ids(7, 3, 5)),
    Case(
        "embedding_bag_sum_offsets",
        lambda: nn.EmbeddingBag(7, 4, mode="sum"),
        both(ids(7, 8), fixed(torch.tensor([0, 3, 3, 6]))),
    ),
    Case(
        "embedding_bag_mean_offsets", lambda: nn.EmbeddingBag(7, 4), both(ids(7, 8), fixed(torch.tensor([0, 3, 3, 6])))
    ),
    Case("embedding_bag_max", lambda: nn.EmbeddingBag(7, 4, mode="max"), ids(7, 3, 5)),
    Case(
        "embedding_bag_max_offsets",
        lambda: nn.EmbeddingBag(7, 4, mode="max", padding_idx=1),
        both(ids(7, 8), fixed(torch.tensor([0, 3, 3, 6]))),
    ),
    Case("embedding_bag_padding", lambda: nn.EmbeddingBag(7, 4, padding_idx=1), ids(7, 3, 5)),
    Case(
        "embedding_bag_last_offset",
        lambda: nn.EmbeddingBag(7, 4, mode="sum", include_last_offset=True),
        both(ids(7, 8), fixed(torch.tensor([0, 3, 6, 8]))),
    ),
    Case(
        "embedding_bag_weighted",
        lambda: nn.EmbeddingBag(7, 4, mode="sum"),
        join(ids(7, 3, 5), named(per_sample_weights=real(3, 5))),
    ),
    Case("embedding_bag_max_norm", lambda: nn.EmbeddingBag(7, 4, max_norm=1.0), ids(7, 3, 5)),
]

RECURRENT = [
    Case("lstm", lambda: nn.LSTM(4, 3), SEQUENCE),
    Case("lstm_no_bias", lambda: nn.LSTM(4, 3, bias=False), SEQUENCE),
    Case(
        "lstm_deep_bidirectional",
        lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True),
        real(3, 5, 4),
    ),
    Case("lstm_projected", lambda: nn.LSTM(4, 5, num_layers=2, proj_size=2, bidirectional=True), SEQUENCE),
    Case("lstm_unbatched", lambda: nn.LSTM(4, 3), real(5, 4)),
    Case("lstm_eval", lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.5), SEQUENCE, training=False),
    Case("lstm_dropout", lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.5), SEQUENCE, random=True),
    Case("lstm_given_state", lambda: own.GivenState(nn.LSTM(4, 5, 2, proj_size=3)), SEQUENCE),
    Case("lstm_packed_input", lambda: own.PackedInput(nn.LSTM(3, 4, 2, bidirectional=True)), packed_inputs),
    Case(
        "lstm_packed_inside",
        lambda: own.PackedClassifier(nn.LSTM(3, 4, bidirectional=True), enforce_sorted=False),
        both(real(4, 5, 3), fixed(torch.tensor([2, 5, 1, 4]))),
    ),
    Case(
        "gru_packed_inside",
        lambda: own.PackedClassifier(nn.GRU(3, 4, 2), enforce_sorted=True),
        both(real(3, 5, 3), fixed(torch.tensor([5, 4, 2]))),
    ),
    Case("lstm_weight_norm", lambda: parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"), SEQUENCE),
    Case("gru", lambda: nn.GRU(4, 3), SEQUENCE),
    Case("gru_no_bias_unbatched", lambda: nn.GRU(4, 3, bias=False), real(5, 4)),
    Case("gru_deep_bidirectional", lambda: nn.GRU(4, 3, 2, bidirectional=True, batch_first=True), real(3, 5, 4)),
    Case("gru_given_state", lambda: own.GivenState(nn.GRU(4, 3, bidirectional=True)), SEQUENCE),
    Case("rnn_tanh", lambda: nn.RNN(4, 3, bidirectional=True), SEQUENCE),
    Case("rnn_relu_deep", lambda: nn.RNN(4, 3, 2, nonlinearity="relu", batch_first=True), real(3, 5, 4)),
    Case("rnn_no_bias", lambda: nn.RNN(4, 3, bias=False), SEQUENCE),
    Case("lstm_cell", lambda: own.CellLoop(nn.LSTMCell(4, 3)), SEQUENCE),
    Case("lstm_cell_unbatched", lambda: own.CellLoop(nn.LSTMCell(4, 3, bias=False)), real(5, 4)),
    Case("gru_cell", lambda: own.CellLoop(nn.GRUCell(4, 3)), SEQUENCE),
    Case("gru_cell_no_bias", lambda: own.CellLoop(nn.GRUCell(4, 3, bias=False)), SEQUENCE),
    Case("rnn_cell", lambda: own.CellLoop(nn.RNNCell(4, 3)), SEQUENCE),
    Case("rnn_cell_relu", lambda: own.CellLoop(nn.RNNCell(4, 3, nonlinearity="relu")), SEQUENCE),
    Case("lstm_language_model", models.RecurrentLanguageModel, ids(10, 5, 3)),
]

ATTENTION = [
    Case("attention", lambda: own.SelfAttention(), real(5, 3, 8)),
    Case("attention_unbatched", lambda: own.SelfAttention(), real(5, 8)),
    Case("attention_no_weights", lambda: own.SelfAttention(False, batch_first=True, bias=False), TOKENS),
    Case("attention_bias_kv", lambda: own.SelfAttention(add_bias_kv=True, add_zero_attn=True), real(5, 3, 8)),
    Case("attention_eval", lambda: own.SelfAttention(batch_first=True), TOKENS, training=False),
    Case("attention_no_weights_eval", lambda: own.SelfAttention(False, batch_first=True), TOKENS, training=False),
    Case("attention_masked", own.MaskedAttention, both(TOKENS, fixed(padding(*_ENDED)))),
    Case("attention_masked_eval", own.MaskedAttention, both(TOKENS, fixed(padding(*_ENDED))), training=False),
    Case("attention_per_head", lambda: own.MaskedAttention(average_weights=False), TOKENS, training=False),
    Case(
        "attention_cross",
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
        both(TOKENS, real(3, 4, 6), real(3, 4, 4)),
    ),
    Case("attention_dropout", lambda: own.SelfAttention(dropout=0.5), real(5, 3, 8), random=True),
    Case("encoder_layer", encoder_layer, real(5, 3, 8)),
    Case("encoder_layer_eval", lambda: encoder_layer(batch_first=True), TOKENS, training=False),
    Case("encoder_layer_norm_first", lambda: encoder_layer(activation="gelu", norm_first=True), real(5, 3, 8)),
    Case(
        "encoder",
        lambda: nn.TransformerEncoder(encoder_layer(batch_first=True), 2),
        join(TOKENS, named(src_key_padding_mask=fixed(padding(*_ENDED)))),
    ),
    Case(
        "encoder_eval",
        lambda: nn.TransformerEncoder(encoder_layer(batch_first=True), 2, norm=nn.LayerNorm(8)),
        join(TOKENS, named(src_key_padding_mask=fixed(padding(*_ENDED)))),
        training=False,
    ),
    Case("decoder_layer", decoder_layer, both(real(4, 3, 8), real(5, 3, 8))),
    Case(
        "decoder_eval",
        lambda: nn.TransformerDecoder(decoder_layer(batch_first=True), 2),
        both(real(3, 4, 8), TOKENS),
        training=False,
    ),
    Case(
        "transformer",
        lambda: nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True),
        join(both(TOKENS, real(3, 4, 8)), named(tgt_mask=fixed(nn.Transformer.generate_square_subsequent_mask(4)))),
    ),
    Case(
        "transformer_eval",
        lambda: nn.Transformer(8, 2, 1, 1, 12, dropout=0.1, batch_first=True),
        both(TOKENS, real(3, 4, 8)),
        training=False,
    ),
    Case("transformer_dropout", lambda: encoder_layer(dropout=0.3), real(5, 3, 8), random=True),
]

RANDOM = [
    Case("dropout", lambda: after(nn.Linear(4, 16), nn.Dropout(0.5)), ROW, random=True),
    Case("dropout_inplace", lambda: after(nn.Linear(4, 16), nn.Dropout(0.5, inplace=True)), ROW, random=True),
    Case("dropout_on_input", lambda: after(nn.Dropout(0.5), nn.Linear(4, 3)), ROW, random=True),
    Case("dropout_eval", lambda: after(nn.Linear(4, 16), nn.Dropout(0.5)), ROW, training=False),
    Case("dropout1d", lambda: after(conv1(8), nn.Dropout1d(0.5)), SIGNAL, random=True),
    Case("dropout2d", lambda: after(conv2(8), nn.Dropout2d(0.5)), IMAGE, random=True),
    Case("dropout3d", lambda: after(conv3(8), nn.Dropout3d(0.5)), VOLUME, random=True),
    Case("alpha_dropout", lambda: after(nn.Linear(4, 16), nn.AlphaDropout(0.5)), ROW, random=True),
    Case("feature_alpha_dropout", lambda: after(conv2(8), nn.FeatureAlphaDropout(0.5)), IMAGE, random=True),
    Case("rrelu", lambda: after(nn.Linear(4, 16), nn.RReLU()), ROW, random=True),
    Case("rrelu_eval", lambda: after(nn.Linear(4, 16), nn.RReLU()), ROW, training=False),
    Case("fractional_max_pool2d", lambda: after(conv2(), nn.FractionalMaxPool2d(2, output_size=4)), IMAGE, random=True),
    Case("variational_autoencoder", models.VariationalAutoencoder, real(5, 6), random=True),
    Case("gumbel_router", models.GumbelRouter, ROW, random=True),
]

SHAPING = [
    Case("max_pool1d", lambda: after(conv1(), nn.MaxPool1d(2)), SIGNAL),
    Case("max_pool2d", lambda: after(conv2(), nn.MaxPool2d(3, stride=2, padding=1)), IMAGE),
    Case("max_pool3d", lambda: after(conv3(), nn.MaxPool3d(2)), VOLUME),
    Case("max_unpool2d", own.Unpool, IMAGE),
    Case("average_pool1d", lambda: after(conv1(), nn.AvgPool1d(3, padding=1)), SIGNAL),
    Case("average_pool2d", lambda: after(conv2(), nn.AvgPool2d(3, 2, count_include_pad=False, padding=1)), IMAGE),
    Case("average_pool3d", lambda: after(conv3(), nn.AvgPool3d(2)), VOLUME),
    Case("lp_pool2d", lambda: after(conv2(), nn.Softplus(), nn.LPPool2d(2.0, 2)), IMAGE),
    Case(
        "adaptive_average_pool", lambda: after(conv1(), nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(12, 2)), SIGNAL
    ),
    Case("adaptive_average_pool2d", lambda: after(conv2(), nn.AdaptiveAvgPool2d((2, 4))), IMAGE),
    Case("adaptive_average_pool3d", lambda: after(conv3(), nn.AdaptiveAvgPool3d(2)), VOLUME),
    Case("adaptive_max_pool1d", lambda: after(conv1(), nn.AdaptiveMaxPool1d(3)), SIGNAL),
    Case("adaptive_max_pool2d", lambda: after(conv2(), nn.AdaptiveMaxPool2d(4)), IMAGE),
    Case("adaptive_max_pool3d", lambda: after(conv3(), nn.AdaptiveMaxPool3d(2)), VOLUME),
    Case("pad_reflection", lambda: after(conv2(), nn.ReflectionPad2d(2)), IMAGE),
    Case("pad_replication", lambda: after(conv3(), nn.ReplicationPad3d(1)), VOLUME),
    Case("pad_circular_zero", lambda: after(conv2(), nn.CircularPad2d(1), nn.ZeroPad2d((1, 0, 2, 0))), IMAGE),
    Case("upsample_nearest", lambda: after(conv2(), nn.Upsample(scale_factor=2)), IMAGE),
    Case("upsample_bilinear", lambda: after(conv2(), nn.Upsample(size=(9, 7), mode="bilinear")), IMAGE),
    Case("upsample_bicubic", lambda: after(conv2(), nn.Upsample(scale_factor=1.5, mode="bicubic")), IMAGE),
    Case("upsample_linear", lambda: after(conv1(), nn.Upsample(size=11, mode="linear", align_corners=True)), SIGNAL),
    Case("upsample_trilinear", lambda: after(conv3(), nn.Upsample(scale_factor=2, mode="trilinear")), VOLUME),
    Case("pixel_shuffle", lambda: after(conv2(), nn.PixelShuffle(2), nn.PixelUnshuffle(3)), IMAGE),
    Case("channel_shuffle", lambda: after(conv2(), nn.ChannelShuffle(2), nn.Softmax2d()), IMAGE),
    Case("unfold_fold", lambda: after(conv2(), nn.Unfold(3, padding=1), nn.Fold((6, 6), 3, padding=1)), IMAGE),
    Case("unflatten", lambda: after(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten()), ROW),
]

STRUCTURE = [
    Case("tied_language_model", own.TiedLanguageModel, ids(9, 3, 4)),
    Case("tied_autoencoder", own.TiedAutoencoder, real(5, 6)),
    Case("shared_submodule", own.SharedSubmodule, ROW),
    Case("frozen_part", own.FrozenPart, SIGNAL),
    Case("frozen_front", lambda: after(frozen(nn.Linear(4, 4)), nn.Linear(4, 3)), ROW),
    Case("no_grad_part", own.NoGradPart, ROW),
    Case("weight_norm", lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), IMAGE),
    Case("spectral_norm", lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), IMAGE),
    Case("spectral_norm_eval", lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), ROW, training=False),
    Case(
        "spectral_norm_deep",
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(2, 3, 3), n_power_iterations=2),
        IMAGE,
    ),
    Case(
        "orthogonal_exponential", lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp"), ROW
    ),
    Case("orthogonal_cayley", lambda: parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="cayley"), ROW),
    Case(
        "orthogonal_householder",
        lambda: parametrizations.orthogonal(nn.Linear(4, 5), orthogonal_map="householder"),
        ROW,
    ),
    Case("parametrized", lambda: parametrized(nn.Linear(4, 3), "weight", own.Scaled(), own.Positive()), ROW),
    Case("weight_norm_hook", lambda: nn.utils.weight_norm(nn.Linear(4, 3)), ROW),
    Case("weight_norm_hook_lstm", lambda: nn.utils.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"), SEQUENCE),
    Case("spectral_norm_hook", lambda: nn.utils.spectral_norm(nn.Conv2d(2, 3, 3)), IMAGE),
    Case("spectral_norm_hook_eval", lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), ROW, training=False),
    Case("pruned", lambda: prune.l1_unstructured(nn.Linear(4, 6), "weight", amount=0.4), ROW),
    Case("non_persistent_buffer", own.NonPersistent, ROW),
    Case("running_centre", own.RunningCentre, ROW),
    Case("running_centre_eval", own.RunningCentre, ROW, training=False),
    Case("mean_teacher", own.MeanTeacher, ROW),
    Case("buffers_only", own.BuffersOnly, ROW),
    Case("colliding_names", own.Colliding, ROW),
    Case("containers", own.Containers, ROW),
    Case("scalar_parameter", own.ScalarParameter, ROW),
    Case("complex_parameter", own.ComplexFilter, real(4, 2, 8)),
    Case("many_outputs", own.ManyOutputs, ROW),
    Case(
        "extra_inputs",
        own.ExtraInputs,
        join(both(real(5, 4), real(5, 2)), lambda g: ((), {"gate": torch.randn(5, 1, generator=g), "power": 2})),
    ),
    Case(
        "keyword_only",
        own.KeywordOnly,
        lambda g: ((), {"batch": {"tokens": torch.randint(7, (3, 4), generator=g), "mask": ~padding(4, 2, 3)}}),
    ),
    Case("loss_inside", own.LossInside, both(real(6, 4), ids(3, 6))),
]

MODELS = [
    Case("resnet_block", lambda: models.BasicBlock(2, 4, stride=2), IMAGE),
    Case("resnet_block_eval", lambda: models.BasicBlock(2, 4, stride=1), IMAGE, training=False),
    Case(
        "inception_block",
        lambda: own.Concatenate(nn.Conv2d(2, 2, 1), conv2(3), after(nn.AvgPool2d(3, 1, 1), nn.Conv2d(2, 2, 1))),
        IMAGE,
    ),
    Case(
        "dense_block",
        lambda: after(own.Concatenate(nn.Identity(), conv2(3)), nn.GroupNorm(1, 5), nn.Conv2d(5, 2, 1)),
        IMAGE,
    ),
    Case("squeeze_excite", lambda: after(conv2(), models.SqueezeExcite(4)), IMAGE),
    Case("unet", models.SmallUNet, real(3, 1, 8, 8)),
    Case(
        "convolutional_autoencoder",
        lambda: after(nn.Conv2d(2, 4, 3, 2, 1), nn.ELU(), nn.ConvTranspose2d(4, 2, 3, 2, 1, 1)),
        IMAGE,
    ),
    Case("wave_block", lambda: after(nn.Conv1d(2, 3, 1), models.WaveBlock(), nn.Conv1d(3, 2, 1)), SIGNAL),
    Case("mixer_block", lambda: models.MixerBlock(5, 8), TOKENS),
    Case("gpt", lambda: models.SmallGPT(fused=False), ids(11, 2, 6)),
    Case("gpt_fused_attention", lambda: models.SmallGPT(fused=True), ids(11, 2, 6)),
    Case(
        "encoder_for_classification",
        models.EncoderForClassification,
        named(input_ids=ids(12, 2, 5), attention_mask=fixed((~padding(5, 3)).long())),
    ),
    Case("vit", models.SmallViT, real(2, 1, 8, 8)),
    Case("vit_eval", models.SmallViT, real(2, 1, 8, 8), training=False),
    Case(
        "residual_mlp",
        lambda: after(own.Residual(after(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU())), nn.Linear(4, 2)),
        ROW,
    ),
    Case(
        "convolutional_recurrent",
        lambda: after(conv1(), own.Permute(2, 0, 1), own.First(nn.GRU(4, 3)), nn.Linear(3, 2)),
        SIGNAL,
    ),
    Case("hyper_network", models.HyperNetwork, both(real(5, 4), real(5, 2))),
    Case("graph_convolution", models.GraphConvolution, both(real(5, 3), ids(5, 2, 8))),
    Case("highway", models.Highway, ROW),
    Case("vector_quantizer", models.VectorQuantizer, ROW),
    Case("deep_set", models.DeepSet, real(4, 6, 3)),
]

ONE_BY_ONE = [
    Case(
        "adaptive_softmax",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 10, [3, 6], div_value=1.5),
        # Every cluster gets a row: without one its parameters have no gradient at all.
        both(ROW, fixed(torch.tensor([0, 4, 7, 1, 5, 9]))),
        loops="selects the rows of each cluster by value",
    ),
    Case("branch_on_value", own.BranchOnValue, ROW, loops="Python control flow on a value"),
    Case("boolean_selection", own.BooleanSelection, ROW, loops="shapes depend on values"),
    Case("records_item", own.RecordsItem, ROW, loops="calls .item()"),
]

CASES: list[Case] = [
    *LINEAR,
    *CONVOLUTION,
    *NORMALISATION,
    *EMBEDDING,
    *RECURRENT,
    *ATTENTION,
    *RANDOM,
    *SHAPING,
    *STRUCTURE,
    *MODELS,
    *ONE_BY_ONE,
]

by_name: dict[str, Case] = {case.name: case for case in CASES}
assert len(by_name) == len(CASES), "two cases of the zoo share a name"
