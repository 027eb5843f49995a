"""Records what a torch function does as a graph of functional operations.

PyTorch itself runs the function once on tensors without values, so Python control flow, views, in-place changes, type
promotion and autograd's boundaries (``detach``, ``no_grad``) mean exactly what they mean in PyTorch. What is left is
a list of core operations with known shapes and dtypes, each of which has one lowering in `bridge.ops`.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bridge.in_place import changes_first_argument
from bridge.known import WritesKnown
from bridge.ops.decompositions import decompositions
from bridge.ops.random import is_random
from bridge.ops.whole import keep_whole
from bridge.taken import taken_by
from bridge.translation import TensorFunction
from bridge.where import running_module
from mb_torch.errors import ModelBatchError, Unsupported

_REMEDY = (
    "Stay within torch operations whose shapes do not depend on values (torch.where, masks; no NumPy, no .item()), or "
    "use backend='torch'."
)


class LooksAtValues(Unsupported):
    """A function cannot be recorded because it looks at values.

    Args:
        what: Which submodule does what.
        fix: What to do about it.
    """

    def __init__(self, what: str, fix: str = _REMEDY) -> None:
        super().__init__(what, fix=fix)
        self.what = what


class Traced(NamedTuple):
    """A function as a graph.

    Attributes:
        graph: Placeholders for the inputs, operations, one output: a list of tensors.
        constants: Tensors that the function took from elsewhere, by the name its nodes use.
        draws: Whether any operation draws random numbers.
        unchanged: For each output, the input it is (a copy of), or None.
        reached: For each output, the inputs that gradients flow to from it.
        dtypes: The dtype of each output.
        text: A digest of the graph; equal ones compute the same from inputs of equal shapes and dtypes.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    draws: bool
    unchanged: list[int | None]
    reached: list[frozenset[int]]
    dtypes: list[torch.dtype]
    text: str

    @property
    def operations(self) -> list[fx.Node]:
        """The nodes that compute something."""
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]


def trace(function: TensorFunction, inputs: Sequence[Tensor], modules: Sequence[nn.Module] = ()) -> Traced:
    """Record what a function does to its inputs.

    Args:
        function: Takes and returns a flat sequence of tensors. It may change its inputs in place; to see such changes
            outside, it must return the inputs.
        inputs: Tensors whose shape, dtype and ``requires_grad`` stand for those of every later call.
        modules: Modules that the function calls, for names in errors.

    Returns:
        The graph, without in-place operations and views.

    Raises:
        LooksAtValues: The function looks at values (``.item()``, ``if tensor:``, boolean selection); the error names
            the innermost submodule.
        Unsupported: It does something else that cannot be recorded.

    Example:
        >>> traced = trace(lambda inputs: [inputs[0].relu().add_(1)], [torch.zeros(3)])
        >>> [str(node.target) for node in traced.operations][-2:]
        ['aten.relu.default', 'aten.add.Tensor']
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [_fake(fake_mode, tensor) for tensor in inputs]

    failure: Exception | None = None
    with ExitStack() as stack:
        stack.enter_context(without_fast_paths())
        stack.enter_context(torch.enable_grad())
        where = stack.enter_context(running_module(modules))

        def recorded(*given: Tensor) -> list[Tensor]:
            # Copies, so that changes in place stay inside.
            own = [tensor.clone() for tensor in given]
            with _Boundaries(where), keep_whole():
                return list(function(own))

        try:
            with fake_mode:
                module = _recorded(recorded, fakes)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _looks_at_values(error, where()) from error
        except UnsupportedOperatorException as error:
            raise Unsupported(
                f"{where()} calls {error.func}, which cannot be recorded without values", fix=_REMEDY
            ) from error
        except WritesKnown as error:
            raise Unsupported(
                f"{where()}: {error} writes what is not known into a tensor of known integers, or made of such",
                fix="Write into a tensor made with torch.zeros, or make a new one (torch.where, torch.randn_like).",
            ) from error
        except ModelBatchError:
            raise
        except Exception as error:  # what the function itself or PyTorch raises
            name = where()
            failure = error
    if failure is not None:
        # An error of the function's own is raised as PyTorch words it.
        taken_by(function, inputs)
        first_line = str(failure).strip().split("\n", 1)[0]
        raise Unsupported(f"{name} cannot be recorded: {type(failure).__name__}: {first_line}") from failure
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    nodes = list(module.graph.nodes)
    outside = {node.target: getattr(module, node.target) for node in nodes if node.op == "get_attr"}
    if any(isinstance(value, torch.Generator) for value in outside.values()):
        raise Unsupported(
            "random numbers of a torch.Generator are drawn, which a compiled program cannot do",
            fix="Draw without generator=; seeds= gives every model random numbers of its own.",
        )
    constants = {name: value.detach() for name, value in outside.items()}
    draws = any(node.op == "call_function" and is_random(node.target) for node in nodes)
    dtypes = [result.meta["val"].dtype for result in nodes[-1].args[0]]
    # The text of a graph says of its constants only what they are called.
    described = f"{module.graph}{[(name, _described(value)) for name, value in constants.items()]}"
    text = hashlib.sha256(described.encode()).hexdigest()
    unchanged, reached = _unchanged(module.graph), _reached(module.graph)
    return Traced(module.graph, constants, draws, unchanged, reached, dtypes, text)


def _recorded(function: Callable[..., Any], fakes: Sequence[Tensor]) -> fx.GraphModule:
    try:
        # Decompositions change tensors in place too, below the first pass.
        return _record(_record(function, fakes), fakes)
    except RuntimeError as error:
        if "automatic differentiation for outputs with complex dtype" not in str(error):
            raise
    # Of copies of complex views PyTorch knows no derivative. None is taken here; requiring it only serves functions
    # that look whether a tensor does.
    fakes = [fake.detach() for fake in fakes]
    return _record(_record(function, fakes), fakes)


def _without_checkpoint(*_: Any, **__: Any) -> Iterator[None]:
    """Take the place of a generator that prepares a function's call, and ends after it."""
    yield


def _record(function: Callable[..., Any], fakes: Sequence[Tensor]) -> fx.GraphModule:
    return make_fx(
        functionalize(function, remove="mutations_and_views"),
        tracing_mode="fake",
        decomposition_table=decompositions(),
        _allow_non_fake_inputs=True,
    )(*fakes)


def _described(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, str]:
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return tuple(tensor.shape), tensor.dtype, digest


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    with mode:
        empty = torch.empty_strided(tensor.shape, tensor.contiguous().stride(), dtype=tensor.dtype)
    return empty.requires_grad_(tensor.requires_grad)


def _looks_at_values(error: Exception, where: str) -> LooksAtValues:
    operation = getattr(error, "func", None)
    what = (
        "the shape of a result depends on values"
        if isinstance(error, DynamicOutputShapeException)
        else "a tensor's value is looked at (.item(), .tolist(), a Python condition)"
    )
    name = operation if isinstance(operation, torch._ops.OpOverload) else getattr(operation, "__name__", operation)
    return LooksAtValues(f"{where}: {what}, in {name}")


# While recording, memory holds nothing.
_LEAVES_TORCH = frozenset((Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__dlpack__))


class _Boundaries(TorchFunctionMode):
    """Writes ``torch.no_grad`` down as ``detach``: what runs under it sees inputs without gradients.

    Args:
        where: Names the submodule that is running.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LEAVES_TORCH or (func is Tensor.tolist and torch._is_functional_tensor(args[0])):
            raise LooksAtValues(f"{self._where()}: a tensor's values leave PyTorch, in {func.__name__}()")
        if getattr(func, "__name__", "") in _STRIDED:
            _check_strided(args, kwargs, self._where())
        if torch.is_grad_enabled():
            return func(*args, **kwargs)
        first = 1 if changes_first_argument(func) else 0
        stopped = pytree.tree_map_only(Tensor, _stop, (args[first:], kwargs))
        return func(*args[:first], *stopped[0], **stopped[1])


_STRIDED = ("as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter")
_SAME_MEMORY = ("view_", "_unsafe_view_", "_reshape_alias_", "unsqueeze_", "squeeze_", "alias_", "detach_")
"""Views that leave all elements where they are."""


def _check_strided(args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
    """Views are recorded as copies, in which strides count other elements than in the memory of what is viewed."""
    base = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if not isinstance(base, Tensor) or not torch._is_functional_tensor(base):
        return
    views = {type(view).__name__ for view in torch._C._functionalization.get_view_meta_sequence(base)}
    if any(not view.startswith(_SAME_MEMORY) for view in views):
        raise Unsupported(
            f"{where}: as_strided of a view of another tensor",
            fix="Use it on a whole, contiguous tensor (tensor.clone(memory_format=torch.contiguous_format)), or index.",
        )


def _stop(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.is_floating_point() or tensor.is_complex() else tensor


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Within the block PyTorch takes no short cuts.

    Fused kernels have no lowering, those for inference not even a derivative; checkpoints would run a part of the
    model again in the backward pass, when it has no parameters any more (XLA decides itself what to keep).
    """
    checkpoints = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    torch.utils.checkpoint._checkpoint_without_reentrant_generator = _without_checkpoint
    attention, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    detect = transformer._detect_is_causal_mask
    # It looks at a mask's values, only to choose a faster kernel for causal ones.
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        torch._C._set_mkldnn_enabled(onednn)
        transformer._detect_is_causal_mask = detect
        torch.utils.checkpoint._checkpoint_without_reentrant_generator = checkpoints


def _unchanged(graph: fx.Graph) -> list[int | None]:
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(node for node in nodes if node.op == "placeholder")}

    def source(node: Any) -> int | None:
        while isinstance(node, fx.Node) and node.target is torch.ops.aten.clone.default:
            node = node.args[0]
        return position.get(node) if isinstance(node, fx.Node) else None

    return [source(node) for node in nodes[-1].args[0]]


# Results that depend on the form of their arguments only, or through which PyTorch lets no gradient flow.
_BARRIERS = frozenset(
    (
        torch.ops.aten.detach_copy.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.rand_like.default,
        torch.ops.aten.randn_like.default,
    )
)


def _reached(graph: fx.Graph) -> list[frozenset[int]]:
    reached: dict[fx.Node, frozenset[int]] = {}
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            reached[node] = frozenset([inputs])
            inputs += 1
        elif node.op == "output":
            return [reached[result] for result in node.args[0]]
        elif node.target in _BARRIERS or not _carries_gradients(node):
            reached[node] = frozenset()
        else:
            reached[node] = frozenset().union(*(reached[source] for source in node.all_input_nodes))
    raise AssertionError("a graph ends with its output")


def _carries_gradients(node: fx.Node) -> bool:
    value = node.meta.get("val")
    results = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(one, Tensor) and (one.is_floating_point() or one.is_complex()) for one in results)
