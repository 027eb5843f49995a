"""Values that are looked at while recording: which inputs a translation is made for, and that it serves no others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor
from torch.nn.utils.rnn import pack_padded_sequence

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from bridge import translate  # noqa: E402
from bridge.arrays import to_jax  # noqa: E402
from bridge.by_value import ByValue, Knowable  # noqa: E402
from bridge.known import KnownValues, known_values, with_known  # noqa: E402
from bridge.trace import LooksAtValues, trace  # noqa: E402
from bridge.translation import Translation  # noqa: E402
from bridge.translators import translate_function  # noqa: E402
from mb_torch.errors import Unsupported  # noqa: E402
from tests.compare import assert_close  # noqa: E402

X = torch.arange(12.0).view(3, 4) / 7


def translated(function: Callable[..., Any], *inputs: Tensor, shared: Sequence[int] = (1,), **more: Any) -> Translation:
    """Translated by recording, and compared with PyTorch."""

    def flat(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        result = function(*tensors)
        return list(result) if isinstance(result, tuple) else [result]

    given = [one.clone().requires_grad_(one.is_floating_point()) for one in inputs]
    checked = translate_function(flat, given, translator="graph", knowable=Knowable(tuple(shared), **more))
    assert checked.comparison is not None
    return checked.translation


def first_below(x: Tensor, n: Tensor) -> Tensor:
    for row, size in zip(x, n, strict=True):
        if size > 1:
            return row[:size].sin()
    return x.sum(0)


def in_place(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    n.add_(1)
    n[0] = 2
    return x * n.max().item(), n


def in_place_after_use(x: Tensor, n: Tensor) -> Tensor:
    before = x[:, :3] + n
    n.add_(1)
    return before * n.max().item()


LOOKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda x, n: x * n[1].item(),
    "int and float": lambda x, n: x * int(n[0]) + float(n[1]),
    "tolist": lambda x, n: sum(x[row, :size].sum() for row, size in enumerate(n.tolist())),
    "tolist of what is computed": lambda x, n: x[: (n + 1).clamp(max=3).tolist()[0]],
    "iteration": lambda x, n: sum(row[:size].sum() for row, size in zip(x, n, strict=True)),
    "condition": first_below,
    "largest": lambda x, n: x[:, : n.max()].exp(),
    "largest, as a number": lambda x, n: x[:, : n.max().item()].exp(),
    "array": lambda x, n: x[:, : int(n.numpy().max())] * np.asarray(n).sum(),
    "python's max": lambda x, n: x[:, : max(n)],
    "range": lambda x, n: sum(x[index].sum() for index in range(n[0])),
    "mask": lambda x, n: x[n > 1],
    "mask of two axes": lambda x, n: x[torch.arange(4) < n[:, None]],
    "mask that is written to": lambda x, n: x.clone().index_fill(0, n[n > 1] - 1, 2.0),
    "assignment": lambda x, n: _assigned(x, n),
    "nonzero": lambda x, n: x.index_select(0, (n > 1).nonzero().squeeze(1)),
    "repeat": lambda x, n: (x.repeat_interleave(n, 0), torch.repeat_interleave(x[0, :3], n)),
    "repeat without values": lambda x, n: x.repeat_interleave(int(n[0]), dim=1),
    "sizes": lambda x, n: (x.new_zeros(n[1], 2) + x[0, 0], torch.ones(n[0], n[1]) * x[0, 1], x.expand(n[0], 3, 4)),
    "narrow": lambda x, n: x.narrow(1, n[0], n[1]),
    "split": lambda x, n: tuple(x.split([int(n[0]), 4 - int(n[0])], dim=1)),
    "sorted": lambda x, n: x[n.sort(descending=True).indices][: n.unique().numel()],
    "changed in place": in_place,
    "changed in place after use": in_place_after_use,
    "returned": lambda x, n: (x * n.max().item(), n, n.float().log().sum()),
    "mixed precision": lambda x, n: x * (n.float() / 3).sum().item(),
    "made from numbers": lambda x, n: x[torch.tensor([True, False, int(n[0]) == 1])],
}


def _assigned(x: Tensor, n: Tensor) -> Tensor:
    own = x.clone()
    own[n > 1] = 0.0
    own[:, : n.min()] = own[:, : n.min()] * 3
    return own


@pytest.mark.parametrize("name", LOOKS)
def test_shared_integers_may_be_looked_at(name: str) -> None:
    sizes = tensor([1, 2, 3])
    made = translated(LOOKS[name], X, sizes)
    assert made.known == (1,)
    expected = LOOKS[name](X.clone(), sizes.clone())
    with jax.enable_x64(True):
        results = made.run([to_jax(X), to_jax(sizes)], None, "native")
    for result, other in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert_close(tensor(np.asarray(result)), other)


def test_what_is_made_of_plain_numbers_may_be_looked_at() -> None:
    pack = lambda x: pack_padded_sequence(x, [3, 2, 1], True).data * torch.arange(3).max().item()  # noqa: E731
    assert translated(pack, X, shared=()).known == ()


def test_only_what_is_looked_at_is_a_constant() -> None:
    table, tokens, sizes = torch.randn(5, 4), torch.zeros(3, dtype=torch.long), tensor([1, 2, 3])
    made = translated(lambda table, tokens, n: table[tokens][: n.max()], table, tokens, sizes, shared=(1, 2))
    assert made.known == (2,)
    with jax.enable_x64(True):
        (result,) = made.run([to_jax(table), to_jax(tensor([4, 0, 2])), to_jax(sizes)], None, "native")
    assert_close(tensor(np.asarray(result)), table[[4, 0, 2]])
    # Only both together decide, and a third does not.
    rows = tensor([2, 0])
    made = translated(lambda x, n, rows, y: x[:, : n[rows].max()] + y.sum(), X, sizes, rows, rows, shared=(1, 2, 3))
    assert made.known == (1, 2)
    # Nothing is looked at.
    assert translated(lambda x, n: x * n.max(), X, sizes).known is None


def test_writing_unknown_values_into_an_integer_does_not_prevent_looking_at_another() -> None:
    def function(x: Tensor, tokens: Tensor, n: Tensor) -> Tensor:
        tokens[0] = x.argmax()
        return x[: n.max()] * tokens.sum()

    assert translated(function, X, tensor([1, 2]), tensor([2, 1]), shared=(1, 2)).known == (2,)


def test_random_numbers_are_drawn_anew() -> None:
    def function(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return x[: n.max()] + torch.rand(n[0], 4), torch.rand_like(n.float())

    inputs = [X, tensor([1, 2])]
    made = trace(with_known(lambda given: list(function(*given)), inputs, [1]), inputs)
    assert made.draws
    assert sum("rand" in str(node.target) for node in made.operations) == 2


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: torch.zeros_like(n, dtype=torch.float).normal_(),
        lambda n: nn.init.uniform_(torch.empty_like(n, dtype=torch.float), 1.0, 2.0),
        lambda n: n.new_zeros(2, dtype=torch.float).bernoulli_(0.5),
        lambda n: torch.full_like(n.float(), 3).exponential_(),
    ],
)
def test_random_numbers_in_new_tensors_are_drawn_anew(draw: Callable[[Tensor], Tensor]) -> None:
    made = translated(lambda x, n: x[: n.max()].sum() + draw(n), X, tensor([1, 2]))
    assert made.draws
    arguments = [to_jax(X), to_jax(tensor([1, 2]))]
    with jax.enable_x64(True):
        one, other = (made.run(arguments, jax.random.key(seed), "native")[0].tolist() for seed in (1, 2))
    assert len({*one, *other}) > 1


@pytest.mark.parametrize(
    "write",
    [
        lambda x, n: n.float().normal_(),
        lambda x, n: n.float().uniform_(1, 2),
        lambda x, n: (n > 0).float().bernoulli_(0.5),
        lambda x, n: n.random_(3),
        lambda x, n: n.add_(x.argmax()),
        lambda x, n: torch.add(n, x.argmax(), out=n),
        lambda x, n: n.__setitem__(0, x.argmax()) or n,
    ],
)
def test_what_is_not_known_is_not_written_into_known_tensors(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(Unsupported, match=r"writes what is not known into a tensor of known(.|\n)*torch\.zeros"):
        translated(lambda x, n: x[: n.max()].sum() + write(x, n + 1), X, tensor([1, 2]))


def test_views_with_the_shape_of_something_unknown_are_of_the_same_memory() -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        n.view_as(x[0, :2]).add_(1)
        return x[: n.max()].sum() * n.expand_as(x[:, :2]).sum()

    assert translated(function, X, tensor([1, 0])).known == (1,)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: x * x.sum().item(),
        lambda x, n: x[x > 0],
        lambda x, n: x[: n.max()] if x.sum() > 0 else x,
        lambda x, n: n[: x.sum().int()] * x[0, 0],
        lambda x, n: x[: (n * x.sum()).int().max()],
        lambda x, n: x * sum(x.tolist()[0]),
    ],
)
def test_values_of_activations_stay_unknown(function: Callable[..., Any]) -> None:
    with pytest.raises(LooksAtValues, match="the function: "):
        translated(function, X, tensor([1, 2]))


def test_what_an_unknown_value_is_written_to_is_not_known() -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        n.copy_(x.argmax())
        return x[: n.max()]

    with pytest.raises(Unsupported):
        translated(function, X, tensor([1, 2]))


def test_integers_of_each_model_are_refused_with_the_remedy() -> None:
    with pytest.raises(LooksAtValues, match=r"every model has its own of\. Share lengths"):
        translated(lambda x, n: x[: n.max()], X, tensor([1, 2]), shared=(), own=(1,))


def test_what_was_known_before_is_tried_first() -> None:
    seen: list[int] = []

    def function(x: Tensor, n: Tensor) -> Tensor:
        seen.append(1)
        return x[: n.max()]

    translated(function, X, tensor([1, 2]))
    first = len(seen)
    translated(function, X, tensor([1, 3]), tried=(1,))
    # Recorded and compared, without the recordings that fail.
    assert 0 < len(seen) - first < first
    # It need not be enough: what is looked at may depend on values.
    more = translated(lambda x, n, m: x[: n[0], : m[0]], X, tensor([1]), tensor([2]), shared=(1, 2), tried=(1,))
    assert more.known == (1, 2)


def test_nothing_is_known_outside() -> None:
    outside = tensor([1])
    with KnownValues() as known:
        inside = known.take(outside)
        assert known_values(inside) is inside
        assert known_values(inside + 1) is not None
        assert known_values(outside) is None
    assert known_values(inside) is None


class TestPrograms:
    def test_programs_are_found_by_form_and_values(self) -> None:
        programs: ByValue[str] = ByValue()
        one, two = [X, tensor([1])], [X, tensor([2])]
        assert programs.get("form", one) is None
        assert programs.places("form") is None
        programs.put("form", [1], one, "one")
        programs.put("form", [1], two, "two")
        programs.put("other", [], one, "any")
        assert [programs.get("form", [X + 1, tensor([value])]) for value in (1, 2, 3)] == ["one", "two", None]
        assert [programs.get("other", given) for given in (one, two)] == ["any", "any"]
        assert (programs.places("form"), programs.places("other")) == ((1,), ())
        assert list(programs.entries()) == ["one", "two", "any"]

    def test_a_program_that_looks_at_more_makes_the_others_be_found_by_more(self) -> None:
        programs: ByValue[str] = ByValue()
        programs.put("form", [1], [X, tensor([1]), tensor([5])], "looks at the first")
        programs.put("form", [2], [X, tensor([2]), tensor([5])], "looks at the second")
        assert programs.places("form") == (1, 2)
        assert programs.get("form", [X, tensor([2]), tensor([5])]) == "looks at the second"
        for first, second in ((1, 5), (2, 6), (3, 5)):
            assert programs.get("form", [X, tensor([first]), tensor([second])]) is None

    def test_the_longest_unused_ones_are_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bridge.by_value._KEPT", 2)
        programs: ByValue[int] = ByValue()
        for value in (1, 2):
            programs.put("form", [0], [tensor(value)], value)
        programs.get("form", [tensor(1)])
        programs.put("form", [0], [tensor(3)], 3)
        assert [programs.get("form", [tensor(value)]) for value in (1, 2, 3)] == [1, None, 3]

    def test_many_sets_of_values_are_warned_about_once(self, caplog: pytest.LogCaptureFixture) -> None:
        programs: ByValue[int] = ByValue()
        with caplog.at_level(logging.WARNING, logger="modelbatch.jax"):
            for value in range(31):
                programs.put("form", [0], [tensor(value)], value)
            assert not caplog.records
            for value in range(31, 100):
                programs.put("form", [0], [tensor(value)], value)
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("modelbatch.jax", "WARNING")
        assert record.getMessage().startswith("32 sets of lengths")
        assert "bucket the lengths" in record.getMessage()

    def test_many_forms_are_warned_about_once(self, caplog: pytest.LogCaptureFixture) -> None:
        programs: ByValue[int] = ByValue()
        with caplog.at_level(logging.WARNING, logger="modelbatch.jax"):
            for value in range(100):
                programs.put(f"form {value}", [], [], value)
        (record,) = caplog.records
        assert record.getMessage().startswith("32 programs so far")
        assert "loss_args=" in record.getMessage()


class TestTranslate:
    """Functions of JAX arrays."""

    def test_a_function_has_a_program_for_each_set_of_values(self) -> None:
        function = translate(lambda x, n: pack_padded_sequence(x, n, True).data * 2, X, tensor([4, 2, 1]))
        for sizes in ([4, 2, 1], [3, 3, 1], [4, 2, 1]):
            expected = pack_padded_sequence(X, tensor(sizes), True).data * 2
            assert_close(tensor(np.asarray(function(to_jax(X), jnp.array(sizes)))), expected)
        assert len(function.report()) == 2
        caught = np.array([2, 2, 2])
        assert jax.jit(lambda x: function(x, caught))(to_jax(X)).shape == (6,)
        with pytest.raises(Unsupported, match=r"array 1 of the arguments has no value inside jax\.jit"):
            jax.jit(function)(to_jax(X), jnp.array([4, 2, 1]))

    def test_a_module(self) -> None:
        layer = nn.LSTM(3, 2)
        x = torch.randn(2, 5, 3)

        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor, n: Tensor) -> Tensor:
                return self.layer(pack_padded_sequence(x, n, True))[1][0]

        module = translate(Last(), x, tensor([5, 2]))
        for sizes in ([5, 2], [3, 1]):
            assert_close(tensor(np.asarray(module(x, tensor(sizes)))), Last()(x, tensor(sizes)).detach())
