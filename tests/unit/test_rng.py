"""Per-model random streams: independence, statistics, torch's semantics, refusals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.random_streams import RandomStreams
from mb_torch.vmap.random_ops import COMPOSITES, REPLACEMENTS
from mb_torch.vmap.rng import Stream, make_keys, seeded
from tests.marks import needs_compiler

CPU = torch.device("cpu")
Function = Callable[[Tensor], Tensor]


def keys(seeds: Sequence[int], step: int = 0) -> Tensor:
    return make_keys(torch.tensor(seeds, dtype=torch.int64), torch.full((len(seeds),), step))


def key(seed: int = 0, step: int = 0) -> Tensor:
    return keys([seed], step)[0]


def alone(function: Function, x: Tensor, seed: int = 0, step: int = 0) -> Tensor:
    """What one model computes outside vmap."""
    with seeded(key(seed, step)):
        return function(x)


def together(function: Function, x: Tensor, seeds: Sequence[int], *, step: int = 0, shared: bool = True) -> Tensor:
    """What several models compute under vmap, ``[num_models, ...]``."""

    def one(own: Tensor, x: Tensor) -> Tensor:
        with seeded(own):
            return function(x)

    return vmap(one, in_dims=(0, None if shared else 0))(keys(seeds, step), x)


class Attention(nn.Module):
    """Self-attention with dropout, as nn.MultiheadAttention computes it."""

    def __init__(self, need_weights: bool, padded: bool = False) -> None:
        super().__init__()
        self.padding = torch.arange(16).expand(6, 16) > 11 if padded else None
        self.inner = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, key_padding_mask=self.padding, need_weights=self.need_weights)[0]


def _exponential_noise(x: Tensor) -> Tensor:
    return torch.zeros_like(x + x).exponential_(2.0)


class Case(NamedTuple):
    """A random function of torch, on an input ``[6, 16, 4]`` of values in (0, 1)."""

    name: str
    function: Function
    works_in_place: bool = False


torch.manual_seed(0)  # for the weights and the sample; each test starts from its own seed anyway
CASES = [
    Case("dropout", lambda x: F.dropout(x, 0.3)),
    Case("nn.Dropout", nn.Dropout(0.3)),
    Case("dropout in place", lambda x: F.dropout(x, 0.3, inplace=True), True),
    Case("torch.dropout", lambda x: torch.dropout(x, 0.3, True)),
    Case("torch.dropout_", lambda x: torch.dropout_(x, 0.3, True), True),
    Case("native_dropout", lambda x: torch.native_dropout(x, 0.3, True)[0]),
    Case("dropout1d", nn.Dropout1d()),
    Case("dropout1d unbatched in place", lambda x: F.dropout1d(x[0], inplace=True), True),
    Case("dropout2d", lambda x: nn.Dropout2d()(x[..., None])),
    Case("dropout3d", lambda x: nn.Dropout3d()(x[..., None, None])),
    Case("feature_dropout", lambda x: torch.feature_dropout(x, 0.5, True)),
    Case("feature_dropout_", lambda x: torch.feature_dropout_(x, 0.5, True), True),
    Case("alpha_dropout", nn.AlphaDropout(0.3)),
    Case("alpha_dropout in place", nn.AlphaDropout(0.3, inplace=True), True),
    Case("feature_alpha_dropout", nn.FeatureAlphaDropout(0.4)),
    Case("feature_alpha_dropout in place", nn.FeatureAlphaDropout(0.4, inplace=True), True),
    Case("rrelu", lambda x: F.rrelu(x - 0.5, 0.1, 0.4, training=True)),
    Case("rrelu in place", lambda x: F.rrelu(x.sub_(0.5), training=True, inplace=True), True),
    Case("nn.RReLU", lambda x: nn.RReLU()(-x)),
    Case("gumbel_softmax", lambda x: F.gumbel_softmax(x, 0.7, dim=1)),
    Case("gumbel_softmax hard", lambda x: F.gumbel_softmax(x, hard=True)),
    Case("attention", lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)),
    Case("MultiheadAttention", Attention(need_weights=False)),
    Case("MultiheadAttention with weights", Attention(need_weights=True)),
    Case("MultiheadAttention with padding", Attention(need_weights=False, padded=True)),
    Case("TransformerEncoderLayer", nn.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True)),
    Case("rand", lambda x: x * torch.rand(6, 16, 4)),
    Case("randn", lambda x: x * torch.randn((6, 16, 4))),
    Case("rand_like", lambda x: torch.rand_like(x)),
    Case("randn_like", lambda x: torch.randn_like(x, dtype=torch.float64)),
    Case("normal", lambda x: torch.normal(x, 2.0)),
    Case("normal of numbers", lambda x: torch.normal(1.0, 2.0, (7,))),
    Case("bernoulli", lambda x: torch.bernoulli(x)),
    Case("bernoulli of a number", lambda x: torch.bernoulli(x, 0.4)),
    Case("Tensor.bernoulli", lambda x: x.bernoulli()),
    Case("multinomial", lambda x: torch.multinomial(x[0], 3)),
    Case("multinomial with replacement", lambda x: x[0, 0].multinomial(9, replacement=True)),
    Case("bernoulli_", lambda x: torch.zeros_like(x).bernoulli_(0.4), True),
    Case("bernoulli_ of a tensor", lambda x: torch.zeros_like(x).bernoulli_(x), True),
    Case("uniform_", lambda x: torch.zeros_like(x).uniform_(-2, 3), True),
    Case("normal_", lambda x: torch.zeros_like(x).normal_(1, 3), True),
    Case("exponential_", _exponential_noise, True),
    Case("nn.init.uniform_", lambda x: nn.init.uniform_(torch.zeros_like(x)), True),
    Case("nn.init.normal_", lambda x: nn.init.normal_(torch.zeros_like(x)), True),
    Case("nn.init.xavier_uniform_", lambda x: nn.init.xavier_uniform_(torch.zeros_like(x)), True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


SAMPLE = torch.rand(6, 16, 4) * 0.9 + 0.05


def sample() -> Tensor:
    return SAMPLE.clone()


# Streams


def test_numbers_are_those_of_splitmix64() -> None:
    # The first outputs of the published generator for seed 1234567: model keys at step 0 of seed s are
    # mix64(gamma ^ mix64(s + gamma)), so the inner call is the generator's first output.
    published = 6457827717110365317
    assert key(1234567).item() == _reference_mix((0x9E3779B97F4A7C15 ^ published) % 2**64)


def _reference_mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def test_words_are_the_documented_function_of_key_draw_and_position() -> None:
    own = key(11, 5)
    stream = Stream(own)
    drawn = [stream.bits(3, CPU, wide=True).tolist() for _ in range(2)]
    expected = [
        [_reference_mix((own.item() ^ 0x9E3779B97F4A7C15 * ((draw << 40) ^ word)) % 2**64) for word in range(3)]
        for draw in (1, 2)
    ]
    assert drawn == expected


def test_golden_values() -> None:
    """The streams never change: checkpoints and published results rely on them."""
    assert keys([0, 1, -1, 2**63 - 1], step=3).tolist() == [
        435472470062713590,
        -5177961148475543345,
        8385511760542867716,
        -263744805409236242,
    ]
    stream = Stream(key(7, 2))
    assert stream.bits(3, CPU).tolist() == [737159228, -2054794746, -225566524]
    assert stream.uniform((3,), torch.float32, CPU).tolist() == [
        0.5636096596717834,
        0.22645574808120728,
        0.9744094014167786,
    ]
    assert stream.uniform((2,), torch.float64, CPU).tolist() == [0.2484445571195073, 0.05061937192269894]
    assert stream.below(0.5, (10,), CPU).int().tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0, 0]
    # Rounded as the machine's logarithm and cosine round.
    for drawn, expected in (
        (stream.normal((3,), torch.float64, CPU), [0.594395405612272, -1.9723117679307391, 0.36911112176696936]),
        (stream.normal((3,), torch.float32, CPU), [-0.776068925857544, 0.5024269819259644, 0.563477098941803]),
        (stream.exponential((3,), torch.float32, CPU), [0.18094858527183533, 0.29402491450309753, 0.46103394031]),
    ):
        torch.testing.assert_close(drawn, torch.tensor(expected, dtype=drawn.dtype))


def test_any_integer_is_a_seed() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 2, 10**30, np.int32(5)]
    streams = RandomStreams(seeds, len(seeds))
    made = make_keys(streams.seeds, streams.steps)
    assert made.dtype == torch.int64
    assert made.unique().numel() == len(seeds)


def test_every_pair_of_seed_and_step_has_its_own_key() -> None:
    seeds, steps = torch.arange(-300, 300).repeat_interleave(300), torch.arange(300).repeat(600)
    assert make_keys(seeds, steps).unique().numel() == 600 * 300


def test_equal_seeds_give_equal_streams() -> None:
    first, second = together(nn.Dropout(0.5), torch.ones(100), [4, 4])
    assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, dtype=torch.int32)])
def test_a_key_is_a_single_int64(bad: Tensor) -> None:
    with pytest.raises(InvalidInput, match="key of a random stream"):
        seeded(bad)


# Statistics. Seeds and therefore results are fixed; bounds are where chance would end up once in 10,000 tries or less.


def words(num_models: int, count: int, *, step: int = 0, draws: int = 1) -> Tensor:
    """All bits of ``draws`` consecutive draws, ``[num_models, draws, count, 64]`` of -1 and 1."""

    def one(own: Tensor) -> Tensor:
        stream = Stream(own)
        return torch.stack([stream.bits(count, CPU, wide=True) for _ in range(draws)])

    drawn = vmap(one)(keys(range(num_models), step))
    return ((drawn[..., None] >> torch.arange(64)) & 1).float() * 2 - 1


def test_bits_are_balanced_and_uncorrelated_within_models_between_models_steps_and_draws() -> None:
    bits, next_step = words(16, 2048, draws=2), words(16, 2048, step=1)
    per_model = bits[:, 0].flatten(1)
    samples = per_model.shape[1]
    bound = 5 / math.sqrt(samples)
    assert per_model.mean(1).abs().max() < bound
    assert bits.mean((0, 1, 2)).abs().max() < 5 / math.sqrt(16 * 2 * 2048)
    between_models = per_model @ per_model.T / samples - torch.eye(16)
    assert between_models.abs().max() < bound
    assert (per_model * bits[:, 1].flatten(1)).mean(1).abs().max() < bound
    assert (per_model * next_step[:, 0].flatten(1)).mean(1).abs().max() < bound
    for lag in (1, 2, 7):
        assert (bits[:, 0, lag:] * bits[:, 0, :-lag]).mean((0, 1)).abs().max() < 5 / math.sqrt(16 * (2048 - lag))
    between_bits = bits[:, 0].flatten(0, 1)
    assert (between_bits.T @ between_bits / len(between_bits) - torch.eye(64)).abs().max() < 5.5 / math.sqrt(
        len(between_bits)
    )


def test_every_bit_of_seed_and_step_moves_half_of_the_bits() -> None:
    seeds = torch.randint(-(2**62), 2**62, (500,))
    steps = torch.arange(500)
    for flipped in range(64):
        mask = torch.tensor(1 << flipped if flipped < 63 else -(2**63))
        for changed in (
            make_keys(seeds ^ mask, steps) ^ make_keys(seeds, steps),
            make_keys(seeds, steps ^ mask) ^ make_keys(seeds, steps),
        ):
            share = ((changed[:, None] >> torch.arange(64)) & 1).float().mean(0)
            assert (share - 0.5).abs().max() < 6 * 0.5 / math.sqrt(500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("draw", "distribution"),
    [("uniform", stats.uniform()), ("normal", stats.norm()), ("exponential", stats.expon())],
    ids=["uniform", "normal", "exponential"],
)
def test_distributions(draw: str, distribution: stats.rv_continuous, dtype: torch.dtype) -> None:
    drawn = getattr(Stream(key(5)), draw)((101, 997), dtype, CPU)
    assert (drawn.dtype, drawn.shape) == (dtype, (101, 997))
    flat = drawn.double().flatten()
    assert stats.kstest(flat.numpy(), distribution.cdf).pvalue > 1e-3
    order = 8 if draw == "normal" else 4
    for power in range(1, order + 1):
        expected, spread = distribution.moment(power), math.sqrt(distribution.moment(2 * power))
        assert abs((flat**power).mean() - expected) < 4 * spread / math.sqrt(flat.numel())
    half = flat.numel() // 2
    assert abs(np.corrcoef(flat[:half], flat[half : 2 * half])[0, 1]) < 4 / math.sqrt(half)
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 4 / math.sqrt(2 * half)


def test_the_two_normals_of_a_pair_are_independent() -> None:
    drawn = Stream(key(9)).normal((2, 50_000), torch.float32, CPU)
    assert abs(np.corrcoef(drawn)[0, 1]) < 4 / math.sqrt(50_000)
    assert abs(np.corrcoef(drawn.square())[0, 1]) < 4 / math.sqrt(50_000)
    assert 4 < drawn.abs().max() < 6.7


@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float64, 53), (torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)]
)
def test_uniform_numbers_use_every_digit_and_stay_below_one(dtype: torch.dtype, digits: int) -> None:
    drawn = Stream(key(1)).uniform((200_000,), dtype, CPU)
    scaled = drawn.double() * 2.0**digits
    assert drawn.dtype == dtype
    assert torch.equal(scaled, scaled.round())
    assert (scaled % 2 == 1).double().mean() == pytest.approx(0.5, abs=0.005)
    assert (drawn.min() >= 0, drawn.max() < 1) == (True, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_numbers_are_rounded_from_single(dtype: torch.dtype) -> None:
    for draw in ("normal", "exponential"):
        expected = getattr(Stream(key(1)), draw)((50,), torch.float32, CPU).to(dtype)
        assert torch.equal(getattr(Stream(key(1)), draw)((50,), dtype, CPU), expected)


class Extremes(Stream):
    """A stream whose bits are the smallest, largest and middle ones."""

    def bits(self, count: int, device: torch.device, *, wide: bool = False) -> Tensor:
        highest = 2 ** (63 if wide else 31) - 1
        values = torch.tensor([0, -1, highest, -highest - 1], dtype=torch.int64 if wide else torch.int32)
        return values.repeat(-(-count // 4))[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rarest_bits_give_numbers_in_range(dtype: torch.dtype) -> None:
    stream = Extremes(key())
    uniform = stream.uniform((4,), dtype, CPU)
    assert (uniform.min(), 1 - uniform.max()) == (0, 2.0 ** -(53 if dtype == torch.float64 else 24))
    positive = stream.positive_uniform((4,), dtype, CPU)
    assert (positive.min(), positive.max()) == (2.0 ** -(64 if dtype == torch.float64 else 32), 1)
    exponential = stream.exponential((4,), dtype, CPU)
    assert 0 < exponential.min() < exponential.max() < math.inf
    assert bool(stream.normal((8,), dtype, CPU).isfinite().all())
    assert stream.below(1e-9, (4,), CPU).tolist() == [False, False, False, True]
    assert stream.below(1 - 1e-12, (4,), CPU).tolist() == [True, True, False, True]


def test_the_rarest_bits_never_pick_what_has_no_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    drawn = REPLACEMENTS[torch.multinomial](Extremes(key()), weights, 4, replacement=True)
    assert set(drawn.tolist()) <= {1, 3}


def test_the_tail_of_the_exponential_distribution() -> None:
    drawn = Stream(key(2)).exponential((4_000_000,), torch.float32, CPU)
    assert 0 < drawn.min() < 1e-5
    assert 12 < drawn.max() < 23


@pytest.mark.parametrize("probability", [1e-3, 0.1, 0.5, 0.9, 1 - 1e-3])
def test_masks_have_their_probability(probability: float) -> None:
    count = 1_000_000
    ones = Stream(key(3)).below(probability, (count,), CPU).sum().item()
    assert stats.binomtest(int(ones), count, probability).pvalue > 1e-3
    ones = alone(torch.bernoulli, torch.full((count,), probability)).sum().item()
    assert stats.binomtest(int(ones), count, probability).pvalue > 1e-3


def test_multinomial_follows_its_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 4.0, 2.0, 0.0], dtype=torch.float64)
    drawn = alone(lambda w: w.multinomial(100_000, replacement=True), weights)
    counts = drawn.bincount(minlength=7)
    assert counts[[0, 3, 6]].sum() == 0
    present = weights > 0
    expected = (weights / weights.sum() * 100_000)[present]
    assert stats.chisquare(counts[present], expected).pvalue > 1e-3


def test_multinomial_without_replacement_draws_one_after_another() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    drawn = alone(lambda w: torch.multinomial(w, 2), weights.expand(60_000, 3))
    assert bool((drawn[:, 0] != drawn[:, 1]).all())
    pairs = [(first, second) for first in range(3) for second in range(3) if first != second]
    counts = [int(((drawn[:, 0] == first) & (drawn[:, 1] == second)).sum()) for first, second in pairs]
    expected = [60_000 * weights[a] / 6 * weights[b] / (6 - weights[a]) for a, b in pairs]
    assert stats.chisquare(counts, np.array(expected, dtype=np.float64)).pvalue > 1e-3


def test_gumbel_softmax_picks_like_a_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    picked = alone(lambda x: F.gumbel_softmax(x, hard=True), logits.expand(50_000, 4))
    assert torch.equal(picked.sum(1), torch.ones(50_000, dtype=torch.float64))
    assert stats.chisquare(picked.sum(0), logits.softmax(0) * 50_000).pvalue > 1e-3


# Independence


@every_case
def test_companions_chunks_and_vmap_do_not_matter(case: Case) -> None:
    seeds = [3, 4, 5]
    inputs = sample().repeat(3, 1, 1, 1)  # per model, so that functions in place may write

    def run(*chosen: int) -> Tensor:
        own = [seeds[index] for index in chosen]
        return together(case.function, inputs[: len(own)].clone(), own, shared=False)

    whole = run(0, 1, 2)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 3
    by_one = torch.stack([alone(case.function, sample(), seed) for seed in seeds])
    torch.testing.assert_close(by_one, whole)
    torch.testing.assert_close(torch.cat([run(0, 1), run(2)]), whole)
    torch.testing.assert_close(run(2, 0), whole[[2, 0]])


@every_case
def test_repeats_for_the_same_seed_and_step_only(case: Case) -> None:
    first = alone(case.function, sample(), 3, step=7)
    torch.manual_seed(99)
    assert torch.equal(alone(case.function, sample(), 3, step=7), first)
    assert not torch.equal(alone(case.function, sample(), 3, step=8), first)
    assert not torch.equal(alone(case.function, sample(), 4, step=7), first)


@every_case
def test_successive_calls_differ_are_counted_and_leave_torchs_generator(case: Case) -> None:
    before = torch.get_rng_state()
    with seeded(key()) as context:
        assert context.draws == 0
        first = case.function(sample())
        once = context.draws
        second = case.function(sample())
    assert once > 0
    assert context.draws == 2 * once
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", [case for case in CASES if not case.works_in_place], ids=lambda case: case.name)
def test_a_shared_input_gives_each_model_its_own_numbers(case: Case) -> None:
    shared = together(case.function, sample(), [3, 4])
    torch.testing.assert_close(shared, torch.stack([alone(case.function, sample(), seed) for seed in (3, 4)]))


@pytest.mark.parametrize("case", [CASES[2], CASES[-5]], ids=lambda case: case.name)
def test_writing_into_what_all_models_share_is_an_error(case: Case) -> None:
    with pytest.raises(RuntimeError, match="vmap"):
        together(lambda x: case.function(x), sample(), [3, 4])


# torch's semantics

DROPOUTS: dict[str, Callable[..., Tensor]] = {
    "dropout": F.dropout,
    "alpha_dropout": F.alpha_dropout,
    "feature_alpha_dropout": F.feature_alpha_dropout,
    "dropout1d": F.dropout1d,
    "dropout2d": F.dropout2d,
    "dropout3d": F.dropout3d,
}
every_dropout = pytest.mark.parametrize("name", DROPOUTS)
INPUTS = {"dropout1d": (30, 8, 5), "dropout2d": (30, 8, 5, 2), "dropout3d": (30, 8, 5, 2, 1)}


@every_dropout
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.99])
def test_values_gradients_and_pattern_of_dropout_are_torchs(name: str, inplace: bool, p: float) -> None:
    def run() -> tuple[Tensor, Tensor, Tensor]:
        leaf = torch.full(INPUTS.get(name, (60, 50, 5)), 3.0, dtype=torch.float64, requires_grad=True)
        x = leaf * 1
        y = DROPOUTS[name](x, p, training=True, inplace=inplace)
        assert (y is x) == inplace or name == "dropout1d"
        y.sum().backward()
        assert leaf.grad is not None
        return y.detach(), leaf.grad, x.detach()

    theirs = run()
    with seeded(key()):
        ours = run()
    for own, torchs in zip(ours, theirs, strict=True):
        assert own.shape == torchs.shape
        torch.testing.assert_close(own.unique(), torchs.unique())
    whole_features = name not in ("dropout", "alpha_dropout")
    assert bool((ours[0].flatten(2) == ours[0].flatten(2)[..., :1]).all()) == whole_features


@every_dropout
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("p", "training"), [(0.0, True), (1.0, True), (0.5, False), (1.0, False)])
def test_dropout_without_chance_draws_nothing(name: str, inplace: bool, p: float, training: bool) -> None:
    x = torch.randn(INPUTS.get(name, (6, 5, 2)))
    expected = DROPOUTS[name](x.clone(), p, training=training)
    with seeded(key()) as context:
        own = x.clone()
        result = DROPOUTS[name](own, p, training=training, inplace=inplace)
    assert context.draws == 0
    assert torch.equal(result, expected)
    if inplace:
        assert torch.equal(own, expected)


@every_dropout
@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_dropout_probabilities_are_checked(name: str, p: float) -> None:
    with pytest.raises(ValueError, match="dropout probability"), seeded(key()):
        DROPOUTS[name](torch.ones(2, 2, 2), p, training=True)


def test_dropout_of_half_precision_integers_and_nothing() -> None:
    half = alone(nn.Dropout(0.5), torch.ones(64, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert set(half.tolist()) == {0.0, 2.0}
    with seeded(key()) as context:
        assert F.dropout(torch.ones(0, 3)).shape == (0, 3)
    assert context.draws == 0
    with pytest.raises(RuntimeError, match="cast"):
        alone(nn.Dropout(0.5), torch.ones(3, dtype=torch.int64))


def test_dropout_keeps_what_is_not_finite_visible() -> None:
    dropped = alone(nn.Dropout(0.9), torch.full((100,), math.nan))
    assert bool(dropped.isnan().all())


def test_unbatched_input_of_dropout_over_channels() -> None:
    rows = alone(nn.Dropout1d(0.5), torch.ones(200, 7))
    assert set(rows.sum(1).tolist()) == {0.0, 14.0}
    volumes = alone(nn.Dropout3d(0.5), torch.ones(200, 3, 2, 2))
    assert set(volumes.flatten(1).sum(1).tolist()) == {0.0, 24.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it will read [N, C, L] as [C, H, W]
        images = alone(nn.Dropout2d(0.5), torch.ones(20, 30, 4))
    assert set(images.flatten(0, 1).sum(1).tolist()) == {0.0, 8.0}


def test_dropout_of_whole_features_needs_two_dimensions() -> None:
    with pytest.raises(InvalidInput, match="whole features"):
        alone(lambda x: torch.feature_dropout(x, 0.5, True), torch.ones(4))


def test_native_dropout_returns_its_mask() -> None:
    with seeded(key()):
        out, mask = torch.native_dropout(torch.ones(1000), 0.2, True)
        same, all_kept = torch.native_dropout(torch.ones(4), 0.2, False)
    assert torch.equal(out, mask * 1.25)
    assert mask.dtype == torch.bool
    assert mask.sum() == pytest.approx(800, abs=50)
    assert torch.equal(same, torch.ones(4))
    assert bool(all_kept.all())


def test_rrelu_slopes_and_gradient() -> None:
    leaf = torch.linspace(-3, 3, 2001, requires_grad=True)
    with seeded(key()):
        y = F.rrelu(leaf, 0.1, 0.3, training=True)
    y.sum().backward()
    assert leaf.grad is not None
    negative = leaf.detach() < 0
    slopes = leaf.grad[negative]
    torch.testing.assert_close(y.detach(), leaf.detach() * leaf.grad)
    assert bool((leaf.grad[leaf.detach() > 0] == 1).all())
    assert stats.kstest(slopes.numpy(), stats.uniform(0.1, 0.2).cdf).pvalue > 1e-3
    with seeded(key()) as context:
        assert torch.equal(F.rrelu(leaf, 0.1, 0.3), F.leaky_relu(leaf, 0.2))
    assert context.draws == 0


ATTENTION: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "float mask": {"attn_mask": torch.randn(2, 1, 5, 6)},
    "bool mask": {"attn_mask": torch.rand(5, 6) > 0.4},
    "a row that sees nothing": {"attn_mask": torch.arange(5)[:, None].expand(5, 6) > 0},
    "grouped queries": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_with_dropout_is_torchs_but_for_the_mask(name: str) -> None:
    query, key_, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    if name != "grouped queries":
        key_, value = key_.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)
    expected = F.scaled_dot_product_attention(query, key_, value, **ATTENTION[name])
    query.requires_grad_()
    with seeded(key()) as context:
        # So rare a dropout that no element of this size is hit.
        ours = F.scaled_dot_product_attention(query, key_, value, dropout_p=1e-9, **ATTENTION[name])
        assert context.draws == 1
        untouched = F.scaled_dot_product_attention(query, key_, value, **ATTENTION[name])
        assert context.draws == 1
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(untouched, expected)
    ours.sum().backward()
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())


def test_attention_drops_weights_and_rescales_the_others() -> None:
    same = torch.zeros(1, 1, 200, 4)
    one_hot = torch.eye(200)[None, None]
    weights = alone(lambda v: F.scaled_dot_product_attention(same, same, v, dropout_p=0.25), one_hot) * 200
    torch.testing.assert_close(weights.unique(), torch.tensor([0.0, 4 / 3]))
    assert (weights == 0).float().mean() == pytest.approx(0.25, abs=0.01)


def test_attention_refuses_a_mask_beside_is_causal() -> None:
    x = torch.ones(1, 3, 4)
    with pytest.raises(InvalidInput, match="attention"), seeded(key()):
        F.scaled_dot_product_attention(x, x, x, torch.ones(3, 3), 0.5, True)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 3, "vdim": 5}], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_runs_torchs_own_body(options: dict[str, object], need_weights: bool) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True, **options)  # type: ignore[arg-type]
    query, other = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    args = (query, other[..., : options.get("kdim", 8)], other[..., : options.get("vdim", 8)])
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    expected = module(*args, key_padding_mask=padding, need_weights=need_weights)
    module.dropout = 1e-9
    with seeded(key()) as context:
        ours = module(*args, key_padding_mask=padding, need_weights=need_weights)
        assert context.draws == 1
        module.eval()
        in_evaluation = module(*args, key_padding_mask=padding, need_weights=need_weights)
        assert context.draws == 1
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(in_evaluation, expected)


def test_a_padding_mask_of_another_shape_is_an_error() -> None:
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), torch.ones(2, 5, 8)
    with pytest.raises(ValueError, match="key_padding_mask"), seeded(key()):
        attention(x, x, x, key_padding_mask=torch.zeros(5, 2, dtype=torch.bool))


def test_options_of_new_tensors() -> None:
    with seeded(key()):
        assert torch.rand(2, 3).shape == (2, 3)
        assert torch.rand([2, 3]).shape == (2, 3)
        assert torch.rand(size=(2, 3)).shape == (2, 3)
        assert torch.randn(()).shape == ()
        assert torch.randn(2, dtype=torch.float64, requires_grad=True).requires_grad
        assert torch.rand_like(torch.ones(3), dtype=torch.float16).dtype == torch.float16
        assert torch.rand(4, device="cpu").device == CPU
        assert torch.normal(torch.zeros(3, 1), torch.ones(4)).shape == (3, 4)
        assert torch.normal(2.0, torch.zeros(4)).tolist() == [2.0] * 4
        with pytest.raises(InvalidInput, match="floating-point"):
            torch.rand(3, dtype=torch.int64)
        with pytest.raises(InvalidInput, match="floating-point"):
            torch.randn(3, dtype=torch.complex64)
        with pytest.raises(Unsupported, match="layout"):
            torch.rand(3, layout=torch.sparse_coo)


def test_parameters_of_filled_tensors() -> None:
    def moments(x: Tensor) -> tuple[float, float]:
        return round(x.mean().item(), 1), round(x.std().item(), 1)

    with seeded(key()):
        assert moments(torch.empty(100_000).uniform_(-1, 5)) == (2.0, 1.7)
        assert moments(torch.empty(100_000).uniform_(to=5)) == (2.5, 1.4)
        assert moments(torch.empty(100_000).normal_(3, 2)) == (3.0, 2.0)
        assert moments(torch.empty(100_000).normal_(std=2)) == (0.0, 2.0)
        assert moments(torch.empty(100_000).exponential_(0.5)) == (2.0, 2.0)
        assert moments(torch.normal(torch.full((100_000,), 3.0), 2.0)) == (3.0, 2.0)
        assert torch.empty(3, dtype=torch.int64).bernoulli_(1.0).tolist() == [1, 1, 1]
        assert torch.bernoulli(torch.tensor([0.0, 1.0, 1.0])).tolist() == [0, 1, 1]
        assert moments(torch.bernoulli(torch.zeros(100_000), 0.1)) == (0.1, 0.3)
        assert torch.bernoulli(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64
        assert torch.empty(2, dtype=torch.float16).normal_().dtype == torch.float16
        with pytest.raises(InvalidInput, match="uniform_"):
            torch.empty(3).uniform_(2, 1)
        with pytest.raises(InvalidInput, match="exponential_"):
            torch.empty(3).exponential_(0.0)
        with pytest.raises(InvalidInput, match="without replacement"):
            torch.multinomial(torch.ones(3), 4)


def test_gradients_under_grad_and_vmap() -> None:
    x = sample()

    def gradient(own: Tensor, x: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            with seeded(own):
                return F.dropout(x, 0.4).sum()

        return grad(loss)(x)

    expected = together(lambda x: F.dropout(x, 0.4), torch.ones_like(x), [3, 4])
    torch.testing.assert_close(vmap(gradient, in_dims=(0, None))(keys([3, 4]), x), expected)


def test_no_gradient_flows_through_a_draw() -> None:
    mean = torch.ones(3, requires_grad=True)
    with seeded(key()):
        assert not torch.normal(mean, 1.0).requires_grad
        assert not torch.multinomial(mean, 2).requires_grad
        filled = (mean * 2).normal_()
    filled.sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == [0, 0, 0]


# Refusals

REFUSED: dict[str, Callable[[Tensor], object]] = {
    "randint": lambda x: torch.randint(0, 5, (3,)),
    "randint_like": lambda x: torch.randint_like(x, 5),
    "randperm": lambda x: torch.randperm(5),
    "poisson": torch.poisson,
    "binomial": lambda x: torch.binomial(x, x),
    "geometric_": lambda x: x.geometric_(0.5),
    "cauchy_": lambda x: x.cauchy_(),
    "log_normal_": lambda x: x.log_normal_(),
    "random_": lambda x: x.random_(),
    "fractional_max_pool2d": lambda x: nn.FractionalMaxPool2d(2, output_size=2)(x),
    "kaiming_uniform_": lambda x: nn.init.kaiming_uniform_(x),
    "lstm": nn.LSTM(4, 4, 2, dropout=0.5),
    "gru": nn.GRU(4, 4, 2, dropout=0.5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_random_functions_without_a_per_model_form_raise(name: str) -> None:
    with pytest.raises(Unsupported, match=rf"^{name}.*Leave out seeds=.*rand"), seeded(key()):
        REFUSED[name](sample())
    with pytest.raises(Unsupported, match=f"^{name}"):
        together(lambda x: REFUSED[name](x) and x, sample().repeat(2, 1, 1, 1), [1, 2], shared=False)


def test_recurrent_functions_of_packed_sequences_raise() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    for module in (nn.LSTM(4, 4, 2, dropout=0.5), nn.RNN(4, 4, 2, dropout=0.5)):
        with pytest.raises(Unsupported, match=r"^(lstm|rnn_tanh)"), seeded(key()):
            module(packed)
    certain = (nn.GRU(4, 4, 2), nn.LSTM(4, 4, 2, dropout=0.5).eval())
    with seeded(key()) as context:
        for module in certain:
            module(packed)
    assert context.draws == 0


def test_recurrent_functions_pass_where_they_are_not_random() -> None:
    x = torch.randn(3, 2, 4)
    for module in (nn.LSTM(4, 4, 2, dropout=0.5).eval(), nn.GRU(4, 4), nn.RNN(4, 4)):
        expected = module(x)[0]
        with seeded(key()) as context:
            assert torch.equal(module(x)[0], expected)
        assert context.draws == 0


@pytest.mark.parametrize(
    "unlisted",
    [
        lambda: torch.ops.aten.rand([3]),
        lambda: torch.ops.aten.dropout(torch.ones(3), 0.5, True),
        lambda: torch.manual_seed(torch.initial_seed() + 1),
    ],
    ids=["an operator", "dropout by another name", "a new seed"],
)
def test_what_escapes_the_names_is_noticed_by_torchs_generator(unlisted: Callable[[], object]) -> None:
    with pytest.raises(Unsupported, match=r"global random generator.*Leave out seeds="), seeded(key()):
        unlisted()


def _draw_and_fail() -> None:
    torch.ops.aten.rand([3])
    raise KeyError


def test_an_error_within_is_not_hidden() -> None:
    with pytest.raises(KeyError), seeded(key()):
        _draw_and_fail()


def test_the_callers_generator_and_out_are_refused() -> None:
    generator = torch.Generator()
    for call in (
        lambda: torch.rand(3, generator=generator),
        lambda: torch.ones(3).uniform_(generator=generator),
        lambda: torch.bernoulli(torch.ones(3), generator=generator),
        lambda: torch.rrelu(torch.ones(3), 0.1, 0.2, True, generator),
    ):
        with pytest.raises(Unsupported, match="generator"), seeded(key()):
            call()
    with pytest.raises(Unsupported, match="out="), seeded(key()):
        torch.rand(3, out=torch.empty(3))
    with seeded(key()):
        assert torch.rand(3, generator=None, out=None).shape == (3,)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_draw_that_would_be_computed_twice_is_refused(use_reentrant: bool) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(Unsupported, match="checkpoint"), seeded(key()):
        checkpoint(F.dropout, x, use_reentrant=use_reentrant)
    with seeded(key()):
        checkpoint(torch.sin, x, use_reentrant=use_reentrant)


# Reached only through the functions of the tables, or internal to a device library.
UNREACHABLE = {
    "rrelu_with_noise": "the form in which autograd sees rrelu",
    "rrelu_with_noise_": "the form in which autograd sees rrelu_",
    "miopen_rnn": "called by lstm, gru and rnn",
}


def test_every_random_function_of_torch_has_a_place_in_the_tables() -> None:
    names = set()
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace != "aten" or name.startswith("_"):
            continue
        operator = getattr(getattr(torch.ops.aten, name), schema.overload_name or "default", None)
        if operator is not None and torch.Tag.nondeterministic_seeded in operator.tags:
            names.add(name)
    assert {"dropout", "rand", "poisson", "exponential_"} <= names
    known = {*REPLACEMENTS, *COMPOSITES}
    missing = {
        f"{place.__name__}.{name}"
        for name in names - set(UNREACHABLE)
        for place in (torch, torch.Tensor, F, torch._C._nn)
        if callable(getattr(place, name, None)) and getattr(place, name) not in known
    }
    assert missing == set()


# torch.compile


def _all_cases(own: Tensor, x: Tensor) -> list[Tensor]:
    outputs = []
    for case in CASES:
        with seeded(own):
            outputs.append(case.function(x + 0))
    return outputs


def test_compiled_functions_draw_the_same_numbers_without_recompiling() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    mapped = vmap(_all_cases, in_dims=(0, 0))
    compiled = torch.compile(mapped, backend=counter, fullgraph=True)
    inputs = sample().repeat(3, 1, 1, 1)
    for step in (0, 1):
        own = keys([3, 4, 5], step)
        for case, result, expected in zip(CASES, compiled(own, inputs), mapped(own, inputs), strict=True):
            torch.testing.assert_close(result, expected, msg=case.name)
    assert counter.frame_count == 1


# torch's own compiler imports what it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@needs_compiler
def test_inductor_draws_the_same_numbers_forward_and_backward() -> None:
    torch._dynamo.reset()

    def gradients(own: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        def loss(weight: Tensor) -> tuple[Tensor, Tensor]:
            with seeded(own):
                hidden = F.dropout(x @ weight + torch.randn(5, 7), 0.3)
                y = F.alpha_dropout(hidden * torch.rand(7), 0.2, training=True)
            return y.square().sum(), y

        return grad(loss, has_aux=True)(weight)

    mapped = vmap(gradients, in_dims=(0, 0, None))
    args = (keys([3, 4, 5], 6), torch.randn(3, 4, 7), torch.randn(5, 4))
    for result, expected in zip(torch.compile(mapped, fullgraph=True)(*args), mapped(*args), strict=True):
        torch.testing.assert_close(result, expected)
