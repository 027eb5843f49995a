"""Mirrors: torch tensors whose values live in JAX arrays."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("jax")

import jax

from bridge.arrays import to_jax, to_torch
from mb_jax.mirror import MirrorBuffer, MirrorParameter, MirrorView, as_mirrors
from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.stacked.model_view import Stack
from mb_torch.stacked.optim import make_optimizer
from mb_torch.state import StackedState

START = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
double_array = jax.jit(lambda x: x * 2, donate_argnums=0)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def make(cls=MirrorParameter):
    """A mirror whose array is the newer side and holds START."""
    mirror = cls(START / 2)
    jax_step(mirror)
    return mirror


def jax_step(mirror):
    mirror.set_array(double_array(mirror.array()))


def values(mirror):
    """What JAX gets; the torch side is not asked."""
    return to_torch(mirror.array()).clone()


def both_are(mirror, expected):
    assert torch.equal(values(mirror), expected)
    assert torch.equal(mirror.detach(), expected)


@torch.no_grad()
def add_(p):
    p.add_(1)


@torch.no_grad()
def operator(p):
    p += 1


@torch.no_grad()
def item(p):
    p[:] += 1


@torch.no_grad()
def out(p):
    torch.add(p, 1, out=p)


@torch.no_grad()
def foreach(p):
    torch._foreach_add_([p], 1)


def data_add(p):
    p.data.add_(1)


def data_set(p):
    p.data = START + 1


def detached(p):
    p.detach().add_(1)


def from_numpy(p):
    array = p.detach().numpy()
    array += 1


def from_dlpack(p):
    np.from_dlpack(p.detach())
    torch.from_dlpack(p.detach()).add_(1)


def to_parameters(p):
    nn.utils.vector_to_parameters((START + 1).flatten(), [p])


def load(p):
    module = nn.Module()
    if isinstance(p, MirrorParameter):
        module.p = p
    else:
        module.register_buffer("p", p)
    module.load_state_dict({"p": START + 1})


def storage(p):
    p.untyped_storage().copy_((START + 1).untyped_storage())


def subclass(p):
    p.requires_grad_(False).as_subclass(torch.Tensor).add_(1)


def set_storage(p):
    with torch.no_grad():
        p.requires_grad_(False).set_(START + 1)


def out_by_name(p):
    with torch.no_grad():
        torch.cat(tensors=(START[:1] + 1, START[1:] + 1), out=p)


WRITES = [add_, operator, item, out, foreach, data_add, data_set, detached, from_numpy, from_dlpack, to_parameters]
WRITES += [load, storage, set_storage, subclass, out_by_name]


@pytest.mark.parametrize("cls", [MirrorParameter, MirrorBuffer])
@pytest.mark.parametrize("write", WRITES)
def test_writes_of_torch_reach_jax_and_those_of_jax_torch(write, cls):
    mirror = make(cls)
    write(mirror)
    assert torch.equal(values(mirror), START + 1)
    jax_step(mirror)
    both_are(mirror, 2 * (START + 1))


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS]
)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_optimizers_of_torch(optimizer, options):
    if options and (optimizer is torch.optim.LBFGS or (optimizer is torch.optim.RMSprop and "fused" in options)):
        pytest.skip("no such option")
    mirror, plain = make(), nn.Parameter(START.clone())
    for _ in range(3):
        for parameter in (mirror, plain):
            chosen = optimizer([parameter], lr=0.1, **options)

            def closure(parameter=parameter, chosen=chosen):
                chosen.zero_grad()
                loss = (parameter**2).sum()
                loss.backward()
                return loss

            chosen.step(closure)
        jax_step(mirror)
        plain.data.mul_(2)
        assert torch.equal(values(mirror), plain.detach())


@pytest.mark.parametrize(
    "hold",
    [
        lambda m: m.data,
        lambda m: m.detach(),
        lambda m: m.detach().view(-1)[:].view(2, 3),
        lambda m: m.T.detach().T,
        lambda m: torch.from_numpy(m.detach().numpy()),
        lambda m: torch.from_dlpack(m.detach()),
        lambda m: torch.from_dlpack(m.detach().__dlpack__()),
        lambda m: m.untyped_storage(),
        lambda m: next(iter(m.detach())),
        lambda m: np.asarray(m),
        lambda m: np.from_dlpack(m),
        lambda m: m.__dlpack__(),
    ],
    ids="data detach view T numpy dlpack capsule storage rows asarray from_dlpack own_capsule".split(),
)
def test_aliases_show_the_latest_and_their_writes_count(hold):
    mirror = make(MirrorBuffer)
    alias = hold(mirror)
    jax_step(mirror)
    jax_step(mirror)
    if isinstance(alias, torch.UntypedStorage):
        assert torch.tensor(alias, dtype=torch.uint8).view(torch.float32).tolist() == (4 * START).flatten().tolist()
        alias.fill_(0)
        assert torch.equal(values(mirror), 0 * START)
        return
    if type(alias).__name__ == "PyCapsule":
        alias = torch.from_dlpack(alias)
    seen = torch.as_tensor(alias)
    expected = 4 * START
    assert torch.equal(seen, expected[: len(seen)] if seen.dim() == 2 else expected[0])
    seen.copy_(seen * 0 + 7)
    for _ in range(2):
        changed = values(mirror)
        assert (changed[: len(seen)] if seen.dim() == 2 else changed[0]).eq(7).all()
    seen.add_(1)  # written twice, without the mirror having been used in between
    assert values(mirror)[0].eq(8).all()


def test_an_alias_written_after_set_array_and_after_array():
    mirror = make()
    alias = mirror.data
    mirror.array()
    alias.add_(1)
    assert torch.equal(values(mirror), START + 1)
    jax_step(mirror)
    alias.add_(1)
    both_are(mirror, 2 * (START + 1) + 1)


def test_without_aliases_nothing_is_copied():
    mirror = make()
    assert mirror.array() is mirror.array()
    alias = mirror.data
    assert mirror.array() is not mirror.array()
    del alias
    mirror.array()
    assert mirror.array() is mirror.array()
    mirror.tolist(), repr(mirror), mirror.clone(), torch.equal(mirror, mirror), mirror.shape, mirror.grad
    mirror.data_ptr(), mirror.numel(), mirror.requires_grad, len(mirror), mirror.is_leaf
    before = mirror.array()
    assert mirror.array() is before


def test_metadata_needs_no_values():
    mirror = make()
    jax_step(mirror)
    version = mirror._version
    assert mirror.shape == (2, 3)
    assert mirror.dtype == torch.float32
    assert mirror.requires_grad
    assert mirror.data_ptr() == mirror.data_ptr()
    mirror.grad = torch.ones(2, 3)
    assert mirror._version == version
    mirror.pull()
    assert mirror._version == version + 1


@pytest.mark.parametrize("read_before", [False, True])
def test_arrays_are_donated(read_before):
    mirror = make()
    for _ in range(3):
        if read_before:
            (mirror.detach() + 1).sum()
        old = mirror.array()
        address = old.unsafe_buffer_pointer()
        jax_step(mirror)
        assert old.is_deleted()
        assert mirror.array().unsafe_buffer_pointer() == address
    both_are(mirror, 8 * START)


def test_a_result_of_a_comparison_can_be_a_mirror():
    mirror = MirrorBuffer(START == 0)
    jax_values = mirror.array()
    torch.eq(START, 2, out=mirror)
    assert not jax_values.any()
    both_are(mirror, START == 2)


def test_pushed_arrays_do_not_follow_torch():
    mirror = make()
    array = mirror.array()
    add_(mirror)
    assert torch.equal(to_torch(array), START)


def test_a_parameter_held_across_steps_shows_the_latest():
    mirror = make()
    for step in range(1, 4):
        jax_step(mirror)
        assert torch.equal(mirror, START * 2**step)
    assert torch.equal(mirror.detach()[1].clone(), 8 * START[1])
    assert (mirror == 8 * START).all()
    assert mirror[0, 0].item() == 8
    assert torch.equal(torch.stack([mirror, mirror])[1], 8 * START)
    assert repr(mirror) == repr(nn.Parameter(8 * START))
    assert repr(make(MirrorBuffer)) == repr(START)
    assert f"{mirror[0, 0]:.1f}" == "8.0"


def test_results_are_plain_tensors():
    mirror = make()
    for result in (mirror.data, mirror.detach(), mirror + 1, mirror[0], mirror.clone(), mirror.T):
        assert type(result) is torch.Tensor
    with torch.no_grad():
        assert mirror.add_(0) is mirror


def test_gradients_arrive_as_usual():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given, mirror):
            ctx.given = given
            return given.detach() * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 * ctx.given.array().shape[0], None

    mirror = make()
    Double.apply(mirror, 0).sum().backward()
    Double.apply(mirror, 0).sum().backward()
    assert torch.equal(mirror.grad, torch.full((2, 3), 8.0))
    assert mirror.is_leaf
    seen = []
    mirror.register_post_accumulate_grad_hook(lambda p: seen.append(p.detach().clone()))
    jax_step(mirror)
    (mirror * 3).sum().backward()
    assert torch.equal(seen[0], 2 * START)
    assert torch.equal(mirror.grad, torch.full((2, 3), 11.0))


def test_autograd_grad_runs_backward_passes_that_see_mirrors():
    mirror, other = make(), make(MirrorBuffer)

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return given.detach() * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * other

    result = Times.apply(mirror).sum()
    jax_step(other)
    (grad,) = torch.autograd.grad(result, mirror)
    assert torch.equal(grad, 2 * START)
    unused = make()
    grads = torch.autograd.grad((mirror**2).sum(), [mirror, unused], materialize_grads=True)
    assert torch.equal(grads[0], 2 * START)
    assert torch.equal(grads[1], 0 * START)
    with pytest.raises(RuntimeError, match="unused|not have been used"):
        torch.autograd.grad((mirror**2).sum(), [unused])


def test_a_graph_of_old_values_gives_their_gradient_or_raises():
    mirror = make()
    loss = (mirror**2).sum()
    jax_step(mirror)
    loss.backward()
    assert torch.equal(mirror.grad, 2 * START)
    loss = (mirror**2).sum()
    jax_step(mirror)
    mirror.tolist()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_vmap_of_a_mirror_sees_the_latest():
    mirror = make()
    jax_step(mirror)
    assert torch.equal(torch.vmap(lambda row: row * 1)(mirror), 2 * START)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("cls", [MirrorParameter, MirrorBuffer])
def test_copies_are_mirrors_of_their_own(cls, duplicate):
    mirror = make(cls).requires_grad_(False)
    twin = duplicate(mirror)
    assert type(twin) is cls
    assert twin.requires_grad is False
    assert torch.equal(values(twin), START)
    add_(twin)
    jax_step(mirror)
    both_are(twin, START + 1)
    both_are(mirror, 2 * START)
    assert twin.array() is twin.array()


def test_deepcopy_keeps_ties_and_drops_gradients_as_parameters_do():
    mirror = make()
    mirror.grad = torch.ones(2, 3)
    first, second = copy.deepcopy([mirror, mirror])
    assert first is second
    assert first.grad is None
    assert first.requires_grad


def test_saving_and_loading():
    module = nn.Module()
    module.p = make()
    module.register_buffer("b", make(MirrorBuffer))
    module.p.note = "kept"
    state = module.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    for saved, safe in ((state, True), (module, False)):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=safe)
        if not safe:
            assert type(loaded.p) is MirrorParameter
            assert type(loaded.b) is MirrorBuffer
            assert loaded.p.note == "kept"
            jax_step(loaded.p)
            assert torch.equal(values(loaded.p), 2 * START)
            loaded = {"p": loaded.p / 2, "b": loaded.b}
        assert torch.equal(loaded["p"], START)
        assert torch.equal(loaded["b"], START)


def test_conversion_of_a_module_keeps_the_parameter():
    module = nn.Module()
    module.p = mirror = make()
    module.double()
    assert module.p is mirror
    assert values(mirror).dtype == torch.float64
    jax_step(mirror)
    both_are(mirror, 2 * START.double())
    module.to(torch.bfloat16)
    jax_step(mirror)
    both_are(mirror, 4 * START.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 2)], ids=str)
def test_dtypes_and_shapes(dtype, shape):
    mirror = MirrorBuffer(torch.ones(shape).to(dtype))
    assert mirror.array().shape == shape
    mirror.set_array(to_jax(torch.zeros(shape, dtype=dtype)))
    both_are(mirror, torch.zeros(shape, dtype=dtype))
    mirror.fill_(1)
    both_are(mirror, torch.ones(shape, dtype=dtype))


def test_arrays_of_another_shape_or_dtype_are_refused():
    mirror = make()
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(InvalidInput, match="expected torch.float32 of shape"):
            mirror.set_array(to_jax(wrong))
    both_are(mirror, START)
    mirror.array()
    float32 = mirror.array()
    mirror.data = START.double()
    with pytest.raises(InvalidInput, match="expected torch.float64"):
        mirror.set_array(float32)
    both_are(mirror, START.double())


def test_expanded_data_gets_memory_of_its_own():
    mirror = MirrorBuffer(torch.ones(1, 3).expand(2, 3))
    mirror.set_array(to_jax(START))
    both_are(mirror, START)


def stack_of_views():
    parameter = make()
    stack = Stack("weight", parameter)
    return parameter, stack, [MirrorView(stack, model) for model in range(2)]


def test_views_use_their_mirror_and_are_no_aliases():
    parameter, _, views = stack_of_views()
    parameter.array()
    assert parameter.array() is parameter.array()
    jax_step(parameter)
    assert views[1].tolist() == (2 * START[1]).tolist()
    add_(views[0])
    expected = 2 * START
    expected[0] += 1
    both_are(parameter, expected)
    alias = views[1].data
    jax_step(parameter)
    assert torch.equal(alias, 2 * expected[1])
    alias.zero_()
    assert values(parameter)[1].eq(0).all()
    del alias
    parameter.array()
    assert parameter.array() is parameter.array()
    del views
    parameter.touch()
    parameter.array()
    assert parameter.array() is parameter.array()


def test_views_keep_their_gradient_and_follow_the_stack():
    parameter, stack, views = stack_of_views()
    (views[1] * 3).sum().backward()
    assert views[0].grad is None
    assert torch.equal(parameter.grad[1], torch.full((3,), 3.0))
    parameter.data = 10 * START
    for view in views:
        view.refresh()
    add_(views[1])
    expected = 10 * START
    expected[1] += 1
    both_are(parameter, expected)
    twins = copy.deepcopy(views)
    assert twins[0]._stack is twins[1]._stack is not stack
    assert type(twins[0]) is MirrorView
    add_(twins[0])
    both_are(parameter, expected)
    assert torch.equal(values(twins[0]._stack.parameter)[0], expected[0] + 1)
    loaded = pickle.loads(pickle.dumps(views))
    assert torch.equal(values(loaded[0]._stack.parameter), expected)


def test_views_need_a_mirror():
    with pytest.raises(InvalidInput, match="'weight'"):
        MirrorView(Stack("weight", nn.Parameter(START.clone())), 0)


def test_optimizers_of_single_models_work_on_views():
    parameter, _, views = stack_of_views()
    optimizers = [torch.optim.SGD([view], lr=rate) for view, rate in zip(views, (0.1, 0.2), strict=True)]
    expected = START.clone()
    for _ in range(2):
        parameter.grad = torch.ones(2, 3)
        for optimizer in optimizers:
            optimizer.step()
        jax_step(parameter)
        expected = (expected - torch.tensor([[0.1], [0.2]])) * 2
        assert torch.equal(values(parameter), expected)


class MirrorStack(Stack):
    def view(self, model):
        return MirrorView(self, model)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.Rprop], ids=["stacked", "views"])
def test_per_model_optimizers_of_the_library_work_on_mirrors(cls):
    mirror, plain = make(), nn.Parameter(START.clone())
    configs = [{"lr": 0.1}, {"lr": 0.2}]
    optimizers = [
        make_optimizer(cls, configs, {"w": mirror}, 2, MirrorStack),
        make_optimizer(cls, configs, {"w": plain}, 2),
    ]
    mirror.array()
    assert mirror.array() is mirror.array()
    for _ in range(3):
        for parameter, optimizer in zip((mirror, plain), optimizers, strict=True):
            parameter.grad = parameter.detach().clone()
            optimizer.step()
        jax_step(mirror)
        plain.data.mul_(2)
        assert torch.equal(values(mirror), plain.detach())
    if cls is torch.optim.Rprop:  # the other one keeps aliases of its own for the next step
        before = mirror.array()
        optimizers[0].follow_stacks()
        assert mirror.array() is before


def tied_state():
    shared, buffer = nn.Parameter(START.clone(), requires_grad=False), START.clone()
    names = {"a.w": "a.w", "b.w": "a.w", "a.m": "a.m", "b.m": "a.m"}
    return StackedState(names, {"a.w": shared}, {"a.m": buffer})


def test_as_mirrors_keeps_ties_gradients_and_values():
    state = tied_state()
    shared = state.parameters["a.w"]
    shared.requires_grad_().grad = torch.ones(2, 3)
    (parameter,), (buffer,) = as_mirrors(state)
    assert state.tree.get_parameter("a.w") is state.tree.get_parameter("b.w") is parameter
    assert state.tree.get_buffer("a.m") is state.tree.get_buffer("b.m") is buffer
    assert parameter.grad is shared.grad
    assert parameter.requires_grad
    again = as_mirrors(state)
    assert again[0][0] is parameter
    assert again[1][0] is buffer
    jax_step(parameter)
    assert torch.equal(shared, 2 * START)
    state.tree.double()
    state.retie_buffers()
    (same,), (other,) = as_mirrors(state)
    assert same is parameter
    assert other is not buffer
    assert state.tree.get_buffer("b.m") is other
    assert other.array().dtype == parameter.array().dtype == np.float64
    assert torch.equal(values(parameter), 2 * START.double())


def test_as_mirrors_refuses_to_lose_hooks():
    state = tied_state()
    state.parameters["a.w"].requires_grad_().register_hook(lambda grad: grad)
    with pytest.raises(Unsupported, match=r"'a\.w' has hooks"):
        as_mirrors(state)
    assert type(state.parameters["a.w"]) is nn.Parameter
