"""A signal whose handler raises finds a training step done wholly or not at all."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.nn import functional as F

from mb_jax import optim, step, step_in_pieces
from mb_jax.uninterrupted import Uninterrupted
from mb_torch import GradScaler, ModelBatch
from tests.compare import assert_equal
from tests.contract.base import batches, build, normed_and_dropping, sgd_for, state_of

needs_alarm = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="the system has no such signal")


class Ended(Exception):
    """Raised by handlers of these tests."""


@pytest.fixture(autouse=True)
def original_handlers() -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGALRM] if hasattr(signal, "SIGALRM") else [])]
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raises_ended(number: int, frame: Any) -> None:
    raise Ended(number)


def handled(number: int) -> int:
    """Make a signal raise `Ended`."""
    signal.signal(number, raises_ended)
    return number


class TestBlock:
    def test_handlers_run_at_the_end_in_the_order_of_the_signals(self) -> None:
        seen: list[Any] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: seen.append(number))
        with Uninterrupted():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            seen.append("end")
        assert seen == ["end", signal.SIGTERM, signal.SIGINT, signal.SIGTERM]

    def test_every_handler_runs_though_each_raises(self) -> None:
        handled(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as caught, Uninterrupted():  # noqa: PT012
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert isinstance(caught.value.__context__, Ended)

    def test_handlers_are_put_back_if_the_block_raises(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, handled(signal.SIGTERM))]
        with pytest.raises(ValueError, match="own"), Uninterrupted():
            raise ValueError("own")
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    def test_an_interrupt_has_the_error_of_the_block_as_its_context(self) -> None:
        with pytest.raises(KeyboardInterrupt) as caught, Uninterrupted():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            raise ValueError("own")
        assert isinstance(caught.value.__context__, ValueError)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_blocks_within_blocks(self) -> None:
        seen = []
        with pytest.raises(KeyboardInterrupt), Uninterrupted():  # noqa: PT012
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
                seen.append("inner")
            seen.append("outer")
        assert seen == ["inner", "outer"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
    def test_what_python_does_not_handle_stays(self, handler: Any) -> None:
        signal.signal(signal.SIGTERM, handler)
        with Uninterrupted():
            assert signal.getsignal(signal.SIGTERM) == handler
        assert signal.getsignal(signal.SIGTERM) == handler

    def test_other_threads_change_nothing(self) -> None:
        seen = []

        def work() -> None:
            with Uninterrupted():
                seen.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [signal.default_int_handler]

    @needs_alarm
    def test_signals_at_any_time_neither_get_lost_nor_break_a_block_off(self) -> None:
        """Signals from a timer hit the entry and the exit of blocks too."""
        seen, begun, ended, raised = [], 0, 0, 0

        def handler(number: int, frame: Any) -> None:
            seen.append(number)
            raise Ended

        signal.signal(signal.SIGALRM, handler)
        # What is raised in callbacks of the collector is not raised further.
        gc.disable()
        try:
            while len(seen) < 200:
                try:
                    # One at a time: several that come at once are one for the system.
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-6 * (len(seen) % 50))
                    for _ in range(10_000):
                        with Uninterrupted():
                            begun += 1
                            sum(range(5))
                            ended += 1
                except Ended:
                    raised += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.enable()
        assert begun == ended
        assert raised == len(seen)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Twins:
    """Two equal batches with optimizers; the second one is never interrupted."""

    def __init__(self) -> None:
        self.pairs = []
        for _ in range(2):
            mb = ModelBatch(build(normed_and_dropping, 3), seeds=[1, 2, 3], backend="jax")
            self.pairs.append((mb, sgd_for(mb)))

    def states(self) -> list[Any]:
        return [copy.deepcopy([state_of(mb), optimizer.state_dict(), mb.streams.steps]) for mb, optimizer in self.pairs]

    def assert_equal(self) -> None:
        assert_equal(*self.states())


def at_first_keep(monkeypatch: pytest.MonkeyPatch, module: Any, number: int) -> list[int]:
    """Have a signal arrive after the first array of a step is in place; return where its arrival is noted."""
    keep: Callable[..., None] = optim.keep
    sent: list[int] = []

    def keeps(*arguments: Any) -> None:
        keep(*arguments)
        if not sent:
            sent.append(number)
            signal.raise_signal(number)

    monkeypatch.setattr(module, "keep", keeps)
    return sent


def by_fused_step(**options: Any) -> Callable[[ModelBatch, Any], Callable[..., Any]]:
    return lambda mb, optimizer: mb.make_train_step(F.cross_entropy, optimizer, **options)


def in_pieces(mb: ModelBatch, optimizer: Any) -> Callable[..., Any]:
    return mb.make_train_step(F.cross_entropy, optimizer, scaler=GradScaler(mb.num_models))


def by_run(mb: ModelBatch, optimizer: Any) -> Callable[..., Any]:
    own = mb.make_train_step(F.cross_entropy, optimizer)
    return lambda inputs, targets: own.run([(inputs, targets)] * 2)


def by_loop(mb: ModelBatch, optimizer: Any) -> Callable[..., Any]:
    def train(inputs: Any, targets: Any) -> None:
        optimizer.zero_grad()
        mb.compute_loss(mb(inputs), targets, F.cross_entropy, reduction="sum").backward()
        optimizer.step()

    return train


WAYS = {
    "fused step": (by_fused_step(), step),
    "fused step with clipping": (by_fused_step(clip_norm=0.1), step),
    "run of two steps": (by_run, step),
    "step in pieces, buffers": (in_pieces, step_in_pieces),
    "step in pieces, update": (in_pieces, optim),
    "documented loop": (by_loop, optim),
}


@pytest.mark.parametrize("signal_name", ["SIGINT", pytest.param("SIGALRM", marks=needs_alarm)])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_done_wholly_when_a_signal_comes(way: str, signal_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, module = WAYS[way]
    twins = Twins()
    interrupted, other = (begin(mb, optimizer) for mb, optimizer in twins.pairs)
    first, second, third = batches(3)
    interrupted(*first)
    other(*first)
    twins.assert_equal()
    number, error = (signal.SIGINT, KeyboardInterrupt)
    if signal_name != "SIGINT":
        number, error = handled(getattr(signal, signal_name)), Ended  # type: ignore[assignment]
    sent = at_first_keep(monkeypatch, module, number)
    with pytest.raises(error):
        interrupted(*second)
    assert sent == [number]
    other(*second)
    twins.assert_equal()
    interrupted(*third)
    other(*third)
    twins.assert_equal()


def test_a_step_is_not_begun_when_a_signal_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins()
    own = by_fused_step()(*twins.pairs[0])
    loop = by_fused_step()(*twins.pairs[1])
    own(*batches(1)[0])
    loop(*batches(1)[0])
    arrays_of = step.arrays_of

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return arrays_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, "arrays_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            own(*batches(2)[1])
    twins.assert_equal()
    own(*batches(2)[1])
    loop(*batches(2)[1])
    twins.assert_equal()
