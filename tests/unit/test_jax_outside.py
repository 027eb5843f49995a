"""What models and losses read besides their arguments is as alive on XLA as it is in PyTorch."""

from __future__ import annotations

import collections
import copy
import functools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("jax")

from bridge.keys import constant_key, value_key
from bridge.taken import Taken, is_written_by_torch_only, taken_by
from mb_jax.outside import read_by
from mb_torch import ModelBatch, OptimizerFactory, Unsupported
from tests.compare import assert_close

FACTOR = 1.0
X, Y = torch.ones(4, 3), torch.zeros(4, 2)


class Settings:
    factor = 1.0

    def __init__(self) -> None:
        self.value = 1.0
        self.not_plain = [object()]

    @property
    def doubled(self) -> float:
        return 2 * self.value

    def set(self, value: float) -> None:
        self.value = value

    def halved(self) -> float:
        return self.value / 2


@dataclass
class Plain:
    value: float = 1.0


def of_a_global(outputs: Tensor) -> Tensor:
    return outputs.square().mean() * FACTOR


def scaled(outputs: Tensor, factor: float) -> Tensor:
    return outputs.square().mean() * factor


def through_a_helper(outputs: Tensor) -> Tensor:
    return of_a_global(outputs) + 0


class Bound:
    def __init__(self) -> None:
        self.factor = 1.0
        self.settings = Settings()

    def loss(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean() * self.factor

    def loss_of_settings(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean() * self.settings.value

    def loss_by_helper(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean() * self._helper()

    def _helper(self) -> float:
        return self.factor * FACTOR

    def __call__(self, outputs: Tensor) -> Tensor:
        return self.loss_by_helper(outputs)


class Base:
    def __init__(self) -> None:
        self.settings = SimpleNamespace(first=1.0, second=1.0, other=object())
        self.in_base = 1.0

    def loss(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean() * self.in_base


class Derived(Base):
    def loss(self, outputs: Tensor) -> Tensor:
        return super().loss(outputs)

    def loss_of_both(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean() * self.settings.first * self._second()

    def _second(self) -> float:
        return self.settings.second


class Encoder(nn.Module):
    def encode(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean() * FACTOR


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, outputs: Tensor) -> Tensor:
        return self.encoder.encode(outputs)


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


class AttributeDict(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.options = {"factor": 1.0, "name": object()}
        self.space = SimpleNamespace(factor=1.0, name=object())

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean() * (self.options["factor"] * self.space.factor)


def _set_global(value: float) -> None:
    global FACTOR
    FACTOR = value


Case = tuple[Callable[[Tensor], Tensor], Callable[[float], Any]]


def _cases() -> dict[str, Case]:
    mapping, numbers, array = {"of": 1.0}, [1.0], np.ones(1)
    space, settings, plain, bound = SimpleNamespace(value=1.0), Settings(), Plain(), Bound()
    scalar, flag, from_numpy = torch.tensor(1.0), torch.tensor([1, 1]), torch.ones(1)
    memory = from_numpy.numpy()

    def outer(value: float) -> Callable[[Tensor], Tensor]:
        def inner(outputs: Tensor) -> Tensor:
            return outputs.square().mean() * value

        return inner

    rebound = SimpleNamespace(function=outer(1.0))
    config = {"of": 1.0, "device": torch.device("cpu"), "numpy": np.float64(1), "tensor": torch.ones(())}
    derived = Derived()
    functions, slotted, attributes, module = (
        [outer(1.0)],
        Slotted(),
        AttributeDict(value=1.0, other=object()),
        Weighted(),
    )
    counts = collections.OrderedDict(value=1.0, other=object())
    partial = SimpleNamespace(loss=functools.partial(scaled, factor=1.0))
    return {
        "global": (of_a_global, _set_global),
        "global of a helper": (through_a_helper, _set_global),
        "dict": (lambda o: o.square().mean() * mapping["of"], lambda v: mapping.update(of=v)),
        "list": (lambda o: o.square().mean() * numbers[0], lambda v: numbers.__setitem__(0, v)),
        "array": (lambda o: o.square().mean() * float(array[0]), lambda v: array.fill(v)),
        "namespace": (lambda o: o.square().mean() * space.value, lambda v: setattr(space, "value", v)),
        "object": (lambda o: o.square().mean() * settings.value, settings.set),
        "class": (lambda o: o.square().mean() * Settings.factor, lambda v: setattr(Settings, "factor", v)),
        "dataclass": (lambda o: o.square().mean() * plain.value, lambda v: setattr(plain, "value", v)),
        "bound method": (bound.loss, lambda v: setattr(bound, "factor", v)),
        "function": (lambda o: rebound.function(o), lambda v: setattr(rebound, "function", outer(v))),
        "mixed dict": (lambda o: o.square().mean() * config["of"], lambda v: config.update(of=v)),
        "number of NumPy": (
            lambda o: o.square().mean() * float(config["numpy"]),
            lambda v: config.update(numpy=np.float64(v)),
        ),
        "replaced tensor": (
            lambda o: o.square().mean() * config["tensor"],
            lambda v: config.update(tensor=torch.tensor(v)),
        ),
        "list of functions": (lambda o: functions[0](o), lambda v: functions.__setitem__(0, outer(v))),
        "ordered dict": (lambda o: o.square().mean() * counts["value"], lambda v: counts.update(value=v)),
        "dict with attributes": (lambda o: o.square().mean() * attributes.value, lambda v: attributes.update(value=v)),
        "property": (lambda o: o.square().mean() * settings.doubled, settings.set),
        "method of an object": (
            lambda o: o.square().mean() * settings.halved(),
            settings.set,
        ),
        "class by instance": (lambda o: o.square().mean() * settings.factor, lambda v: setattr(Settings, "factor", v)),
        "slots": (lambda o: o.square().mean() * slotted.value, lambda v: setattr(slotted, "value", v)),
        "getattr": (lambda o: o.square().mean() * getattr(settings, "value", None), settings.set),
        "attribute of an attribute": (bound.loss_of_settings, lambda v: setattr(bound.settings, "value", v)),
        "helper of a method": (bound.loss_by_helper, _set_global),
        "object that two methods read": (derived.loss_of_both, lambda v: setattr(derived.settings, "second", v)),
        "first of two": (derived.loss_of_both, lambda v: setattr(derived.settings, "first", v)),
        "method of a base": (derived.loss, lambda v: setattr(derived, "in_base", v)),
        "method of a submodule": (Encoding(), _set_global),
        "callable object": (bound, lambda v: setattr(bound, "factor", v)),
        "dict of a module": (module, lambda v: module.options.update(factor=v)),
        "namespace of a module": (module, lambda v: setattr(module.space, "factor", v)),
        "partial": (
            lambda o: partial.loss(o),
            lambda v: setattr(partial, "loss", functools.partial(scaled, factor=v)),
        ),
        "tensor": (lambda o: o.square().mean() * scalar, lambda v: scalar.fill_(v)),
        "item": (lambda o: o.square().mean() * scalar.item(), lambda v: scalar.fill_(v)),
        "tolist": (lambda o: o.square().mean() * flag.tolist()[0], lambda v: flag.fill_(int(v))),
        "condition": (lambda o: o.square().mean() * (3.0 if scalar > 2 else 1.0), lambda v: scalar.fill_(v)),
        "memory of NumPy": (lambda o: o.square().mean() * from_numpy.sum(), lambda v: memory.fill(v)),
    }


@pytest.mark.parametrize("name", _cases())
def test_a_loss_reads_what_it_reads_anew(name: str) -> None:
    loss, change = _cases()[name]
    mb = ModelBatch([nn.Linear(3, 2) for _ in range(2)], backend="jax", backend_options={"verify": False})
    optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.0}).create_optimizer(mb, [{}] * 2)
    step = mb.make_train_step(lambda outputs, _: loss(outputs), optimizer)
    try:
        before = step(X, Y).detach().clone()
        change(3.0)
        assert_close(step(X, Y).detach().clone(), 3 * before)
        change(1.0)
        assert_close(step(X, Y).detach().clone(), before)
    finally:
        change(1.0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.factors = [1.0]
        self.array = np.ones(1)
        self.lengths = torch.tensor([1, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (FACTOR * self.factors[0] * float(self.array[0]) * self.lengths.tolist()[0])


@pytest.mark.parametrize("name", ["global", "list", "array", "looked-at tensor", "dtype"])
def test_a_model_reads_what_it_reads_anew(name: str) -> None:
    mb = ModelBatch([Scaled() for _ in range(2)], backend="jax", backend_options={"verify": False})
    before = mb(X).detach().clone()
    model: Any = mb.prototype
    try:
        if name == "global":
            _set_global(3.0)
        elif name == "list":
            model.factors[0] = 3.0
        elif name == "array":
            model.array[0] = 3.0
        elif name == "looked-at tensor":
            model.lengths.fill_(3)
        else:
            mb.double()
            assert mb(X.double()).dtype == torch.float64
            return
        assert_close(mb(X).detach().clone(), 3 * before)
    finally:
        _set_global(1.0)


def test_dtypes_of_parameters_are_part_of_a_program_without_floating_inputs() -> None:
    mb = ModelBatch([nn.Embedding(3, 2) for _ in range(2)], backend="jax")
    tokens = torch.tensor([0, 2])
    assert mb(tokens).dtype == torch.float32
    mb.double()
    assert mb(tokens).dtype == torch.float64


def test_a_mix_of_dtypes_raises_as_in_pytorch() -> None:
    mb = ModelBatch([nn.Linear(3, 2) for _ in range(2)], backend="jax")
    with pytest.raises(RuntimeError, match="same dtype, but got Double and Float"):
        mb(X.double())
    with pytest.raises(RuntimeError, match="same dtype, but got Long and Float"):
        mb(X.long())


@pytest.mark.parametrize("view", [False, True])
def test_writes_to_tensors_from_outside_are_refused(view: bool) -> None:
    average = torch.ones(3)

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            (average[:2] if view else average).mul_(0.5)
        return outputs.square().mean() * average.sum()

    mb = ModelBatch([nn.Linear(3, 2) for _ in range(2)], backend="jax")
    optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.1}).create_optimizer(mb, [{}] * 2)
    with pytest.raises(
        Unsupported, match=r"from outside is written to \(torch\.float32 of shape \(3,\)\)(.|\n)*buffer"
    ):
        mb.make_train_step(loss, optimizer)(X, Y)
    if not view:
        assert average.tolist() == [1, 1, 1]


def test_a_refused_step_leaves_the_random_state_of_python() -> None:
    random.seed(0)
    before = random.getstate()
    mb = ModelBatch([nn.Linear(3, 2) for _ in range(2)], backend="jax")
    optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.1}).create_optimizer(mb, [{}] * 2)
    step = mb.make_train_step(lambda outputs, _: outputs.sum() * random.random(), optimizer)
    with pytest.raises(Unsupported):
        step(X, Y)
    assert random.getstate() == before


def test_constants_of_other_shapes_are_other_programs() -> None:
    class Weighted(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.weights = torch.arange(6.0).view(shape)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x).sum() * self.weights).amax(1).sum().view(1)

    for shape in ((2, 3), (3, 2)):
        models = [Weighted(*shape) for _ in range(2)]
        expected = torch.stack([model(X) for model in models])
        assert_close(ModelBatch(models, backend="jax")(X), expected)


def test_who_is_active_may_change_while_steps_are_on_their_way() -> None:
    def trained(*, change: bool) -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        mb = ModelBatch([nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2)) for _ in range(8)], backend="jax")
        optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.1}).create_optimizer(mb, [{}] * 8)
        active = torch.ones(8, dtype=torch.bool)
        step = mb.make_train_step(nn.functional.mse_loss, optimizer, active=active)
        x, y = torch.randn(256, 300), torch.randn(256, 2)
        step(x, y).sum().item()
        for _ in range(4):
            step(x, y)
        if change:
            active.fill_(False)
        return mb.get_model_states()

    assert_close(trained(change=True), trained(change=False), atol=0.0, rtol=0.0)


def test_rows_of_memory_that_numpy_writes_to() -> None:
    memory = np.ones((6, 3), np.float32)
    x, y, rows = torch.from_numpy(memory), torch.zeros(6, 2), torch.tensor([[0, 1], [2, 3]])
    mb = ModelBatch([nn.Linear(3, 2, bias=False) for _ in range(2)], backend="jax")
    optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.0}).create_optimizer(mb, [{}] * 2)
    step = mb.make_train_step(nn.functional.mse_loss, optimizer)
    before = step.run_rows(x, y, rows).detach().clone()
    memory[:] = 2
    assert_close(step.run_rows(x, y, rows).detach().clone(), 4 * before)


def test_forward_hooks_are_said_to_run_once(caplog: pytest.LogCaptureFixture) -> None:
    models = [nn.Sequential(nn.Linear(3, 2)) for _ in range(2)]
    for model in models:
        model[0].register_forward_hook(lambda module, args, output: output * 2)
    expected = torch.stack([model(X) for model in models])
    with caplog.at_level(logging.WARNING, logger="modelbatch.jax"):
        mb = ModelBatch(models, backend="jax")
        assert_close(mb(X), expected)
        mb.prototype[0].register_forward_hook(lambda module, args, output: output * 2)
        assert_close(mb(X), 2 * expected)
    assert "0 (Linear) has forward hooks" in caplog.text


class Trainer:
    def __init__(self) -> None:
        self.steps = 0
        self.history: list[float] = []
        self.last = torch.zeros(())
        self.data = list(range(1000))

    def loss(self, outputs: Tensor, _: Tensor) -> Tensor:
        return outputs.square().mean()

    def counted_loss(self, outputs: Tensor, _: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return outputs.square().mean()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


@pytest.mark.parametrize("name", ["trainer", "counting loss", "counting model", "global of the same name"])
def test_what_is_not_read_does_not_matter(name: str) -> None:
    trainer = Trainer()
    model: Callable[[], nn.Module] = Counting if name == "counting model" else lambda: nn.Linear(3, 2)
    mb = ModelBatch([model() for _ in range(2)], backend="jax", backend_options={"verify": False})
    optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.1}).create_optimizer(mb, [{}] * 2)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "counting loss": trainer.counted_loss,
        # Globals called mean and square change below.
        "global of the same name": lambda outputs, _: outputs.square().mean(),
    }
    step = mb.make_train_step(losses.get(name, trainer.loss), optimizer)
    for count in range(4):
        globals()["mean"], globals()["square"] = torch.rand(3), count
        trainer.last = step(X, Y)
        trainer.steps += 1
        trainer.history.append(float(count))
        mb(X)
    report = mb.backend_report()
    assert [len(own["translations"]) for own in report["steps"]] == [1]
    assert len(report["translations"]) == 1


def test_functions_that_know_each_other_are_read_once() -> None:
    functions: list[Any] = []
    for number in range(30):
        functions.append(lambda outputs, own=number: functions[own - 1](outputs) if own else outputs.sum())
    assert read_by(functions[-1]) == read_by(functions[-1])


def test_equal_functions_have_equal_keys_and_others_do_not() -> None:
    def make(value: float) -> Callable[[Tensor], Tensor]:
        return lambda outputs: outputs.sum() * value

    assert read_by(make(1.0)) == read_by(make(1.0))
    assert read_by(make(1.0)) != read_by(make(2.0))
    assert read_by(torch.relu) != read_by(torch.tanh)
    assert read_by(nn.functional.relu) != read_by(nn.functional.silu)
    assert read_by(nn.MSELoss()) != read_by(nn.L1Loss())
    assert read_by(functools.partial(scaled, factor=1.0)) != read_by(functools.partial(scaled, other=1.0))
    assert read_by(lambda outputs: outputs.sum()) != read_by(lambda outputs: outputs.mean())


def test_objects_that_cannot_be_looked_at_count_by_identity() -> None:
    class Odd:
        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("do not look")

    odd, other = Odd(), Odd()
    assert read_by(lambda outputs: outputs * odd.value) != read_by(lambda outputs: outputs * other.value)


class TestKeys:
    def test_plain_values_count_by_value(self) -> None:
        for make in (lambda: [1, {"a": (2.0, None)}], lambda: np.arange(3), lambda: Plain(2.0), lambda: "text"):
            assert constant_key(make()) == constant_key(make())
        assert constant_key(np.arange(3)) != constant_key(np.arange(3.0))
        assert constant_key([1]) != constant_key([True])
        assert constant_key([1]) != constant_key((1,))

    def test_what_holds_itself_or_objects_has_no_values(self) -> None:
        endless: list[Any] = []
        endless.append(endless)
        assert value_key(endless) is None
        assert value_key([object()]) is None
        assert constant_key(endless) == constant_key(endless)

    def test_a_recursive_function_has_caught_itself(self) -> None:
        def loss(outputs: Tensor, depth: int = 2) -> Tensor:
            return outputs.sum() if depth == 0 else loss(outputs, depth - 1)

        assert read_by(loss) == read_by(loss)


class TestTaken:
    def test_inputs_and_results_are_not_taken(self) -> None:
        factor, unused = torch.tensor(2.0), torch.tensor(3.0)

        def function(inputs: Any) -> list[Tensor]:
            inputs[0].add_(1)
            return [(inputs[0].T * factor).sum(), torch.ones(1)]

        assert [id(one) for one in taken_by(function, [torch.ones(2, 2)])] == [id(factor)]
        assert unused == 3

    def test_a_changed_tensor_is_not_current(self) -> None:
        array = np.ones(2)
        tensors = [torch.ones(2), torch.from_numpy(array), torch.ones(2)]
        late = tensors[2].numpy()
        taken = [Taken(one) for one in tensors]
        assert [is_written_by_torch_only(one) for one in tensors] == [True, False, False]
        assert all(one.is_current() for one in taken)
        tensors[0].add_(1)
        array[:] = 5
        late[:] = 5
        assert not any(one.is_current() for one in taken)

    def test_the_arguments_of_a_copied_batch_stay_apart(self) -> None:
        mb = ModelBatch([Scaled() for _ in range(2)], backend="jax", backend_options={"verify": False})
        before = mb(X).detach().clone()
        other: Any = copy.deepcopy(mb)
        other.prototype.factors[0] = 2.0
        assert_close(other(X).detach().clone(), 2 * before)
        assert_close(mb(X).detach().clone(), before)


@pytest.mark.parametrize("large", [dict.fromkeys(range(10_001), 1.0), [1.0] * 10_002], ids=["dict", "list"])
def test_large_containers_are_said_not_to_be_read(large: Any, caplog: pytest.LogCaptureFixture) -> None:
    def loss(outputs: Tensor) -> Tensor:
        return outputs.sum() * large[0]

    with caplog.at_level(logging.WARNING, logger="modelbatch.jax"):
        before = read_by(loss)
        large[0] = 2.0
        assert read_by(loss) == before
    (told,) = caplog.messages
    assert f"a {type(large).__name__} of {len(large)} entries" in told
    assert "loss_args" in told
