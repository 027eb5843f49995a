"""Random streams, one per model: counter-based numbers and the context that makes a model draw from its own.

Word ``i`` of draw ``d`` of a model is ``mix64(key ^ gamma * (((d + 1) << 40) ^ i))``, where ``mix64`` and ``gamma``
are the output function and the constant of SplitMix64. Nothing is carried from word to word, so a model's numbers
do not depend on its companions, on chunks or on the device, and there is no state to keep: (seed, step) is all.

Sources: G. L. Steele Jr., D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014
(SplitMix64; it passes BigCrush); J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
(counters in place of state); G. E. P. Box, M. E. Muller, "A note on the generation of random normal deviates", 1958.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.vmap.random_ops import COMPOSITES, COVERED, REPLACEMENTS

# Constants of SplitMix64 as signed 64-bit numbers: torch has no unsigned multiplication and shift everywhere.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - 2**64
_SECOND_FACTOR = 0x94D049BB133111EB - 2**64

# The counter's low bits number the words of one draw, the rest the draws.
_WORD_BITS = 40

_UNFLATTEN = torch.Tensor.unflatten

# Random bits of a uniform number: as many as make every value exact.
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def make_keys(seeds: Tensor, steps: Tensor) -> Tensor:
    """Mix each model's seed and step into the key of its stream.

    One seed never has the same key at two steps, nor have two seeds at the same step; other pairs of (seed, step)
    share one with probability 2^-64.

    Args:
        seeds: ``[num_models]`` int64, any values.
        steps: ``[num_models]`` int64.

    Returns:
        ``[num_models]`` int64.

    Example:
        >>> make_keys(torch.tensor([0, 1]), torch.tensor([0, 0]))
        tensor([  258863698125685209, -2467430514417656476])
    """
    roots = _mix64(seeds + _GAMMA)
    return _mix64(((steps + 1) * _GAMMA).bitwise_xor_(roots))


def _mix64(words: Tensor) -> Tensor:
    """Apply the output function of SplitMix64 to int64 ``words``, in place.

    The masks turn torch's arithmetic right shift into a logical one; multiplication wraps.
    """
    words.bitwise_xor_((words >> 30).bitwise_and_((1 << 34) - 1)).mul_(_FIRST_FACTOR)
    words.bitwise_xor_((words >> 27).bitwise_and_((1 << 37) - 1)).mul_(_SECOND_FACTOR)
    return words.bitwise_xor_((words >> 31).bitwise_and_((1 << 33) - 1))


class Stream:
    """The random numbers of one model in one forward pass.

    Every method that draws takes the next numbers; the same calls in the same order give the same numbers. Integers
    and uniform numbers are equal on every device, normal and exponential ones up to the rounding of ``log``.

    Args:
        key: 0-dim int64 (under vmap: batched), an element of what `make_keys` returns.

    Attributes:
        draws: How many draws there were.

    Example:
        >>> Stream(make_keys(torch.tensor([7]), torch.tensor([0]))[0]).uniform((2,), torch.float32, torch.device("cpu"))
        tensor([0.9159, 0.7669])
    """

    def __init__(self, key: Tensor) -> None:
        if key.dtype != torch.int64 or key.dim() != 0:
            received = f"{key.dtype} of shape {tuple(key.shape)}"
            raise InvalidInput("the key of a random stream", received=received, expected="a 0-dim int64 tensor")
        self.key = key
        self.draws = 0

    def bits(self, count: int, device: torch.device, *, wide: bool = False) -> Tensor:
        """Draw ``[count]`` integers with all their bits random: int64 if ``wide``, else int32."""
        words = count if wide else (count + 1) // 2
        self.draws += 1
        # xor where a plain sum would do: torch.compile folds sums and products of an arange into one exact
        # index expression, which then no longer fits 64 bits.
        counters = torch.arange(words, dtype=torch.int64, device=device).bitwise_xor_(self.draws << _WORD_BITS)
        key = self.key if self.key.device == device else self.key.to(device)
        mixed = _mix64(counters.mul_(_GAMMA) ^ key)
        if wide:
            return mixed
        lanes = mixed.view(torch.int32)
        return lanes if count % 2 == 0 else lanes[:count]

    def below(self, probability: float, shape: Sequence[int], device: torch.device) -> Tensor:
        """Draw booleans of ``shape`` that are true with ``probability``, exact to 2^-33."""
        # A threshold of 2^31 (probability 1) would not fit into int32.
        threshold = min(round(probability * 2**32), 2**32 - 1) - 2**31
        return (self.bits(math.prod(shape), device) < threshold).reshape(shape)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Draw from [0, 1) on a grid of 2^-24 (float32), 2^-53 (float64), 2^-11 (float16) or 2^-8 (bfloat16)."""
        if dtype not in _DIGITS:
            raise InvalidInput("random numbers", received=dtype, expected="a real floating-point dtype")
        compute, width = _arithmetic(dtype)
        digits = _DIGITS[dtype]
        lanes = self.bits(math.prod(shape), device, wide=width == 64)
        whole = (lanes >> (width - digits)).bitwise_and_((1 << digits) - 1)
        return whole.to(compute).mul_(2.0**-digits).reshape(shape).to(dtype)

    def positive_uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Draw from (0, 1], in float32 or float64, with steps near 0 as fine as 2^-31 or 2^-63."""
        compute, width = _arithmetic(dtype)
        return _positive(self.bits(math.prod(shape), device, wide=width == 64), compute, width).reshape(shape)

    def exponential(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Draw from the exponential distribution of rate 1, by inversion; never 0, because users divide by it."""
        uniform = self.positive_uniform(shape, dtype, device)
        return uniform.log_().neg_().clamp_min_(torch.finfo(uniform.dtype).eps / 2).to(dtype)

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Draw from the standard normal distribution, by Box and Muller's method."""
        compute, width = _arithmetic(dtype)
        count = math.prod(shape)
        pairs = (count + 1) // 2
        lanes = self.bits(2 * pairs, device, wide=width == 64)
        radius = _positive(lanes[:pairs], compute, width).log_().mul_(-2).sqrt_()
        angle = lanes[pairs:].to(compute).mul_(math.pi * 2.0 ** (1 - width))
        both = torch.cat([radius * angle.cos(), radius * angle.sin()])
        return both[:count].reshape(shape).to(dtype)


def _arithmetic(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """The dtype to compute numbers of ``dtype`` in, and how many random bits each takes."""
    return (torch.float64, 64) if dtype == torch.float64 else (torch.float32, 32)


def _positive(lanes: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    digits = width - 1  # without the sign
    return (lanes & ((1 << digits) - 1)).to(dtype).add_(0.5).mul_(2.0**-digits)


class _Replacing(TorchFunctionMode):
    """Within the block, random functions of torch draw from ``stream``."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = REPLACEMENTS.get(func)
        if replacement is not None:
            _refuse_recomputation()
            return replacement(self.stream, *args, **(kwargs or {}))
        body = COMPOSITES.get(func)
        if body is None:
            # Not random: attention calls this method, which torch.compile cannot trace under a mode.
            plain = torch.unflatten if func is _UNFLATTEN else func
            return plain(*args, **(kwargs or {}))
        # torch switches this mode off while it handles a call; what the body draws must come here as well.
        with _Replacing(self.stream):
            return body(*args, **(kwargs or {}))


class seeded:
    """Within the block, one model draws its random numbers from its own stream.

    Replaced are the dropout family (functions and modules), attention with dropout, ``rrelu``, ``gumbel_softmax``,
    ``rand``, ``randn``, ``normal`` and their ``_like`` forms, ``bernoulli``, ``multinomial`` and the in-place
    ``bernoulli_``, ``uniform_``, ``normal_`` and ``exponential_``. Any other random function of torch raises; what
    escapes the list of names is noticed on leaving the block, because torch's own generator has moved. Randomness
    from outside torch (``random``, ``numpy.random``) is not seen.

    Works under ``vmap`` with a batched key, under ``grad`` and inside functions that ``torch.compile`` traces; there
    the generator is not looked at, but vmap's ``randomness="error"`` turns what escapes the list into an error.

    Args:
        key: 0-dim int64 (under vmap: batched), an element of what `make_keys` returns.

    Attributes:
        draws: How many draws there were; 0 means that the block was not random.

    Raises:
        Unsupported: A random function without a per-model form, a ``generator=`` of the caller's, or a draw inside
            ``torch.utils.checkpoint``, whose second pass would draw other numbers.

    Example:
        >>> key = make_keys(torch.tensor([7]), torch.tensor([0]))[0]
        >>> with seeded(key) as context:
        ...     out = torch.nn.functional.dropout(torch.ones(8), 0.5)
        >>> out, context.draws
        (tensor([2., 2., 2., 0., 2., 0., 2., 0.]), 1)
    """

    def __init__(self, key: Tensor) -> None:
        self._stream = Stream(key)
        self._mode = _Replacing(self._stream)
        self._before: list[Tensor] = []

    @property
    def draws(self) -> int:
        """How many draws there were."""
        return self._stream.draws

    def __enter__(self) -> seeded:
        if torch.compiler.is_compiling():
            _trace_every_random_function()
        else:
            self._before = _generator_states(self._stream.key.device)
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, traceback)
        if kind is None and not torch.compiler.is_compiling():
            self._check_generators()

    def _check_generators(self) -> None:
        after = _generator_states(self._stream.key.device)
        if not all(torch.equal(*states) for states in zip(self._before, after, strict=True)):
            raise Unsupported(
                "the model drew from torch's global random generator by a function that has no per-model form",
                fix=f"Leave out seeds=, or use one of the functions that have: {COVERED}.",
            )


def _trace_every_random_function() -> None:
    """Make ``torch.compile`` ask modes about every random function; runs while it traces `seeded`.

    Tracing asks modes only about functions that it lists as overridable. Its list lacks ``randn_like`` and others
    that do ask modes when they are not compiled: they would draw from the global generator.
    """
    try:
        from torch._dynamo.variables.torch import get_overridable_functions
    except ImportError as error:
        raise Unsupported("this version of torch cannot compile models with seeds=", fix="Leave one out.") from error
    get_overridable_functions().update(REPLACEMENTS)


# The mark of torch.compiler.assume_constant_result, "run this while tracing", which would import the compiler here.
_trace_every_random_function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _generator_states(device: torch.device) -> list[Tensor]:
    """The states of the global generators that a model on ``device`` may use."""
    states = [torch.default_generator.get_state()]
    if device.type == "mps":
        states.append(torch.mps.get_rng_state())
    elif device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _refuse_recomputation() -> None:
    """Refuse to draw inside a checkpointed region: its second pass runs during backward, outside `seeded`."""
    if torch.compiler.is_compiling():  # the compiled graph recomputes the same numbers
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise Unsupported(
                "a model draws random numbers inside torch.utils.checkpoint, whose second pass would draw others",
                fix="Leave out seeds=, or draw outside the checkpointed part.",
            )
        frame = frame.f_back
