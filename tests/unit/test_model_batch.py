"""`ModelBatch` beyond the backend contract: memory, backends by name, and how it behaves as an `nn.Module`."""

from __future__ import annotations

import copy
import gc
import sys
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import (
    InvalidInput,
    ModelBatch,
    OptimizerFactory,
    Unsupported,
    available_backends,
    backend,
    make_joint_step,
    register_backend,
)
from mb_torch.targets import targets_are_shared
from mb_torch.vmap.engine import VmapBackend
from tests.compare import assert_close, assert_different, assert_equal

INPUTS = torch.linspace(-1, 1, 24).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def build(make: Any = mlp, count: int = 3) -> list[nn.Module]:
    return [make() for _ in range(count)]


# Memory


def test_source_models_are_not_kept() -> None:
    models = build()
    dead = [weakref.ref(item) for model in models for item in (model, *model.modules(), *model.parameters())]
    mb = ModelBatch(models)
    mb(INPUTS)
    del models
    gc.collect()
    assert all(reference() is None for reference in dead)
    assert mb.num_models == 3


@pytest.mark.long
def test_a_factory_s_models_exist_one_at_a_time() -> None:
    made: list[weakref.ref[nn.Module]] = []
    most = 0

    def factory() -> nn.Module:
        nonlocal most
        gc.collect()
        most = max(most, sum(reference() is not None for reference in made))
        model = mlp()
        made.append(weakref.ref(model))
        return model

    ModelBatch.from_factory(factory, seeds=range(10))
    gc.collect()
    assert most <= 1
    assert all(reference() is None for reference in made)


def tensors_alive() -> list[Tensor]:
    # isinstance would ask lazy objects of other packages for their class.
    return [item for item in gc.get_objects() if issubclass(type(item), Tensor)]


def test_a_batch_holds_one_copy_of_everything() -> None:
    models = build()
    expected = sum(t.numel() * t.element_size() for m in models for t in (*m.parameters(), *m.buffers()))
    del models
    gc.collect()
    before = {id(item) for item in tensors_alive()}
    mb = ModelBatch(build())
    gc.collect()
    new = [tensor for tensor in tensors_alive() if id(tensor) not in before and not tensor.is_meta]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}
    assert sum(held.values()) == expected
    assert mb.num_models == 3


def test_the_prototype_takes_no_memory_and_is_no_submodule() -> None:
    mb = ModelBatch(build())
    assert all(tensor.is_meta for tensor in (*mb.prototype.parameters(), *mb.prototype.buffers()))
    assert all(module is not mb.prototype for module in mb.modules())


# Backends


def test_backends_are_found_by_name() -> None:
    assert "torch" in available_backends()
    assert ModelBatch(build()).backend.name == "torch"
    assert ModelBatch(build(), backend="torch").backend.name == "torch"


class Recording(VmapBackend):
    """Another backend under another name."""

    name = "recording"


def test_a_registered_backend_is_loaded_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_REGISTRY", dict(backend._REGISTRY))
    register_backend("recording", "recording_backend:Recording")
    assert "recording" in available_backends()
    plain = ModelBatch(build())
    assert "recording_backend" not in sys.modules
    module = types.ModuleType("recording_backend")
    module.Recording = Recording  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recording_backend", module)
    other = ModelBatch(build(), backend="recording")
    assert isinstance(other.backend, Recording)
    assert type(plain.backend) is VmapBackend
    assert isinstance(other.select([1]).backend, Recording)
    assert isinstance(copy.deepcopy(other).backend, Recording)
    monkeypatch.setenv("MODELBATCH_BACKEND", "recording")
    assert isinstance(ModelBatch(build()).backend, Recording)
    assert type(ModelBatch(build(), backend="torch").backend) is VmapBackend
    assert isinstance(ModelBatch.from_factory(mlp, seeds=[1]).backend, Recording)


def test_a_backend_is_registered_by_the_path_of_an_attribute() -> None:
    for path in ("module", "module:a:b", ""):
        with pytest.raises(InvalidInput, match="expected 'package.module:attribute'"):
            register_backend("bad", path)
    assert "bad" not in available_backends()


def test_a_joint_step_needs_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        name = "foreign"

    one, other = ModelBatch(build()), ModelBatch(build())
    optimizers = [OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{}] * 3) for mb in (one, other)]
    monkeypatch.setattr(other, "backend", Foreign())
    with pytest.raises(InvalidInput, match="a batch on 'foreign'; expected one backend"):
        make_joint_step([one, other], lambda a, b, x, y: F.cross_entropy(a(x) + b(x), y), optimizers)


def test_the_report_says_how_models_run() -> None:
    report = ModelBatch(build()).backend_report()
    assert report["backend"] == "torch"
    assert report["runs"] == "vmap"
    assert report["reason"] is None
    assert ModelBatch(build(count=1)).backend_report()["runs"] == "plain PyTorch"
    assert ModelBatch(build(), chunk_size=2).backend_report()["chunk_size"] == 2


def test_one_model_runs_without_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("vmap for a single model")

    model = mlp()
    mb = ModelBatch([model])
    monkeypatch.setattr(torch, "vmap", refuse)
    assert_close(mb(INPUTS)[0], model(INPUTS))
    mb.compute_loss(mb(INPUTS), LABELS, F.cross_entropy).backward()
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.1}])
    mb.make_train_step(F.cross_entropy, optimizer)(INPUTS, LABELS)


# As a module


def test_names_are_those_of_a_model_under_one_prefix() -> None:
    mb = ModelBatch(build())
    assert [name for name, _ in mb.named_parameters()] == [f"stack.{name}" for name, _ in mlp().named_parameters()]
    assert list(mb.state_dict()) == [f"stack.{name}" for name in mlp().state_dict()]


class OddNames(nn.Module):
    """Names that no attribute access could spell."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("two words", nn.Linear(4, 4))
        self.add_module("größe", nn.ModuleDict({"0-1": nn.Linear(4, 4)}))
        self.register_parameter("import", nn.Parameter(torch.rand(4)))
        self.register_buffer("_", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("größe")["0-1"](self.get_submodule("two words")(x))
        return x * getattr(self, "import") + self._


def test_odd_names_are_names_like_others() -> None:
    models = build(OddNames)
    mb = ModelBatch(models)
    assert_close(mb(INPUTS), torch.stack([model(INPUTS) for model in models]))
    other = ModelBatch(build(OddNames))
    other.load_state_dict(mb.state_dict())
    assert_equal([dict(state) for state in other.get_model_states()], [dict(m.state_dict()) for m in models])
    expected = torch.stack([model.double()(INPUTS.double()) for model in models])
    assert_close(mb.double()(INPUTS.double()), expected, atol=1e-12, rtol=1e-12)


def test_a_batch_inside_another_module() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch = ModelBatch(build())
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.batch(x))

    parent = Parent()
    parent(INPUTS).sum().backward()
    assert all(parameter.grad is not None for parameter in parent.parameters())
    parent.eval()
    assert not parent.batch.training
    assert not any(module.training for module in parent.batch.prototype.modules())
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    parent(INPUTS)
    assert_equal(dict(parent.state_dict()), before)
    other = Parent().eval()
    other.load_state_dict(parent.state_dict())
    assert_equal(other(INPUTS), parent(INPUTS))
    assert parent.double()(INPUTS.double()).dtype == torch.float64


def test_load_state_dict_by_assignment() -> None:
    mb, other = ModelBatch(build()), ModelBatch(build())
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.1}] * 3)
    mb.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    assert_equal(mb(INPUTS), other(INPUTS))
    assert all(a is b for a, b in zip(mb.parameters(), mb.stacked_params.values(), strict=True))
    before = mb.get_model_states()
    try:
        mb.make_train_step(F.cross_entropy, optimizer)(INPUTS, LABELS)
    except InvalidInput as error:
        assert "optimizer" in str(error)  # noqa: PT017 - its parameters are no longer the batch's: said, or followed
    else:
        assert_different([s["0.weight"] for s in mb.get_model_states()], [s["0.weight"] for s in before])


def test_a_selection_keeps_its_chunks() -> None:
    mb = ModelBatch(build(), chunk_size=2)
    assert mb.select([0, 1]).backend_report()["chunk_size"] == 2
    assert copy.deepcopy(mb).backend_report()["chunk_size"] == 2


def test_tied_buffers_stay_one_after_a_conversion() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("one", torch.zeros(3))
            self.other = nn.Module()
            self.other.register_buffer("same", self.one)

        def forward(self, x: Tensor) -> Tensor:
            self.one += 1
            return self.linear(x) + self.other.same

    # A conversion unties the buffers of a plain module, so the loop is no reference here.
    models = build(Counts)
    mb = ModelBatch(models).double()
    for step in (1, 2):
        expected = torch.stack([model.linear.double()(INPUTS.double()) + step for model in models])
        assert_close(mb(INPUTS.double()), expected)
    for state in mb.get_model_states():
        assert_equal(state["other.same"], torch.full((3,), 2.0, dtype=torch.float64))
        assert_equal(state["one"], state["other.same"])
    assert_equal([value for name, value in mb.state_dict().items() if "same" in name], [mb.stacked_buffers["one"]])


def test_freezing_later() -> None:
    models = build()
    mb = ModelBatch(models)
    mb.stacked_params["0.weight"].requires_grad_(False)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.1}] * 3)
    step = mb.make_train_step(F.cross_entropy, optimizer)
    step(INPUTS, LABELS)
    mb.compute_loss(mb(INPUTS), LABELS, F.cross_entropy, "sum").backward()
    assert mb.stacked_params["0.weight"].grad is None
    for model, state in zip(models, mb.get_model_states(), strict=True):
        assert_equal(state["0.weight"], model[0].weight)
        assert_different(state["3.weight"], model[3].weight)


def test_hooks_of_the_batch_itself() -> None:
    mb, seen = ModelBatch(build()), []
    mb.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    mb(INPUTS)
    assert seen == [torch.Size([3, 6, 3])]


def test_second_order_gradients() -> None:
    models = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    mb = ModelBatch(models)

    def penalty(outputs: Tensor, parameters: list[Tensor]) -> Tensor:
        grads = torch.autograd.grad(outputs.square().sum(), parameters, create_graph=True)
        return torch.stack([grad.square().sum() for grad in grads]).sum()

    penalty(mb(INPUTS), list(mb.parameters())).backward()
    for model in models:
        penalty(model(INPUTS), list(model.parameters())).backward()
    for name, stack in mb.stacked_params.items():
        if name != "2.bias":
            assert_close(stack.grad, torch.stack([dict(m.named_parameters())[name].grad for m in models]), rtol=1e-3)


def test_inputs_that_need_gradients_in_chunks() -> None:
    models, x = build(), INPUTS.clone().requires_grad_()
    ModelBatch(models, chunk_size=2)(x).sum().backward()
    received, x.grad = x.grad, None
    torch.stack([model(x) for model in models]).sum().backward()
    assert_close(received, x.grad)


def test_the_device_can_be_given() -> None:
    mb = ModelBatch(build(), device="cpu")
    assert {p.device.type for p in mb.parameters()} == {"cpu"}
    assert {p.device.type for p in ModelBatch(build(), device="meta").parameters()} == {"meta"}


def test_models_on_the_meta_device_stay_there() -> None:
    mb = ModelBatch([nn.Linear(4, 3, device="meta") for _ in range(2)])
    assert mb(torch.zeros(6, 4, device="meta")).shape == (2, 6, 3)


# Inputs


class InPlace(nn.Module):
    """Changes its input in place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "number":
            x.add_(1)
        elif self.kind == "weight":
            x.mul_(self.weight.detach())
        elif self.kind == "item":
            x.add_(1)
            self.weight.sum().item()
        return F.relu_(x) * self.weight


@pytest.mark.parametrize("kind", ["relu", "number", "weight", "item"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": 2}, {"shared_input": False}])
@pytest.mark.parametrize("count", [1, 3])
def test_models_that_change_their_inputs_in_place(kind: str, options: dict[str, Any], count: int) -> None:
    """What one model does to its input is no other model's business."""
    models = build(lambda: InPlace(kind), count)
    expected = torch.stack([model(INPUTS.clone()) for model in models])
    mb = ModelBatch(models, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one after another")
        for _ in range(2):
            inputs = INPUTS.clone()
            assert_close(mb(inputs if mb.shared_input else inputs.repeat(count, 1, 1)), expected)
    step = mb.make_train_step(F.mse_loss, torch.optim.SGD(mb.parameters(), lr=0.0), shared_targets=True)
    losses = torch.stack([F.mse_loss(own, INPUTS) for own in expected])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one after another")
        for _ in range(2):
            inputs = INPUTS.clone()
            assert_close(step(inputs if mb.shared_input else inputs.repeat(count, 1, 1), INPUTS), losses.detach())


def test_no_rows_at_all() -> None:
    models = build(lambda: nn.Linear(4, 3))
    assert ModelBatch(models)(torch.zeros(0, 4)).shape == (3, 0, 3)
    assert ModelBatch(models, False)(torch.zeros(3, 0, 4)).shape == (3, 0, 3)


def test_inputs_are_not_changed() -> None:
    mb, before = ModelBatch(build()), INPUTS.clone()
    mb(INPUTS)
    mb.make_train_step(F.cross_entropy, torch.optim.SGD(mb.parameters(), lr=0.1))(INPUTS, LABELS)
    assert_equal(INPUTS, before)


def test_what_hides_tensors_is_refused() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Boxes(nn.Linear):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return Box(super().forward(x))

    with pytest.raises(Unsupported, match="returned a Box.*pytree"):
        ModelBatch([Boxes(4, 3), Boxes(4, 3)])(INPUTS)


def test_replaced_parameters_are_refused() -> None:
    class Replaces(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.weight = nn.Parameter(self.weight.detach() * 2)
            return y

    mb = ModelBatch([Replaces(4, 3), Replaces(4, 3)])
    before = mb.get_model_states()
    with pytest.raises(Unsupported, match="'weight'"):
        mb(INPUTS)
    assert_equal(mb.get_model_states(), before)


def test_plain_attributes_that_a_forward_pass_sets_do_not_leak() -> None:
    """A model that remembers its last activation must not hand out a tensor from inside vmap."""

    class Remembers(nn.Linear):
        last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    models = [Remembers(4, 3) for _ in range(3)]
    mb = ModelBatch(models)
    expected = torch.stack([model(INPUTS) for model in models])
    for _ in range(2):
        assert_close(mb(INPUTS), expected)
    for duplicate in (copy.deepcopy(mb), mb.select([1, 2])):
        assert_close(duplicate(INPUTS)[-1], expected[-1])
    assert_close(mb.model(1)(INPUTS), expected[1])


# Targets


@pytest.mark.parametrize(
    ("shape", "num_models", "batch", "shared"),
    [
        ((6,), 3, 6, True),
        ((6, 2), 3, 6, True),
        ((3, 6), 3, 6, False),
        ((3, 6, 2), 3, 6, False),
        ((6, 6, 2), 6, 6, None),
        ((3,), 3, 3, True),
        ((3, 3), 3, 3, None),
        ((3, 5), 3, 6, None),
        ((), 3, 6, True),
        ((1, 6), 1, 6, False),
        ((1,), 1, 1, True),
    ],
)
def test_targets_are_told_apart_by_shape(shape: tuple[int, ...], num_models: int, batch: int, shared: Any) -> None:
    targets = torch.zeros(shape)
    if shared is None:
        with pytest.raises(InvalidInput, match="shared_targets=True"):
            targets_are_shared(targets, num_models=num_models, batch=batch)
    else:
        assert targets_are_shared(targets, num_models=num_models, batch=batch) is shared


@pytest.mark.parametrize(
    ("accepted", "shared"),
    [((True, False), True), ((False, True), False), ((True, True), None), ((False, False), None)],
)
def test_where_both_shapes_fit_the_loss_decides(accepted: tuple[bool, bool], shared: Any) -> None:
    """The loss is asked with all targets (are they one model's?) and with those of model 0."""

    def loss_fits(given: Tensor) -> bool:
        return accepted[0] if given.dim() == 2 else accepted[1]

    arguments: dict[str, Any] = {"num_models": 3, "batch": 3, "loss_fits": loss_fits}
    if shared is None:
        with pytest.raises(InvalidInput, match="shared_targets"):
            targets_are_shared(torch.zeros(3, 3), **arguments)
    else:
        assert targets_are_shared(torch.zeros(3, 3), **arguments) is shared


def test_broadcasting_does_not_count_as_fitting() -> None:
    """`mse_loss` takes targets of another size and only warns; it must not be asked that way."""
    models = [nn.Linear(4, 1) for _ in range(3)]
    mb, targets = ModelBatch(models), torch.rand(3, 3, 1)
    expected = torch.stack([F.mse_loss(m(INPUTS[:3]), y) for m, y in zip(models, targets, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as it may be in a script; in the tests every warning is an error
        assert_close(mb.compute_loss(mb(INPUTS[:3]), targets, F.mse_loss, "none"), expected)
        step = mb.make_train_step(F.mse_loss, torch.optim.SGD(mb.parameters(), lr=0.0))
        assert_close(step(INPUTS[:3], targets), expected)


def test_deciding_about_targets_draws_no_random_numbers_and_changes_nothing() -> None:
    mb = ModelBatch([nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)) for _ in range(3)])
    step = mb.make_train_step(F.cross_entropy, torch.optim.SGD(mb.parameters(), lr=0.1))
    torch.manual_seed(1)
    mb_first = mb.get_model_states()
    step(INPUTS[:3], torch.tensor([[0, 1, 2], [2, 1, 0], [1, 0, 0]]))
    decided = torch.get_rng_state()
    mb.load_model_states(mb_first)
    torch.manual_seed(1)
    step(INPUTS[:3], torch.tensor([[0, 1, 2], [2, 1, 0], [1, 0, 0]]))
    assert_equal(torch.get_rng_state(), decided)
    assert mb.stacked_buffers["0.num_batches_tracked"].tolist() == [1, 1, 1]
