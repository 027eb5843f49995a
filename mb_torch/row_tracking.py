"""Which results of a torch operation on routed tensors have which real rows.

A result keeps the rows only where its row j of model i is known to come from row j of model i alone. Known
are operations that treat every row apart (element by element, along trailing dimensions, products with a
matrix on the right), those that only move data (indexing, reshaping, flipping), which are followed exactly by
sending row numbers through the same operation, and writes in place. Every other operation returns a plain
tensor, with a warning where that could be mistaken for routed data.

A routed tensor is known here only as an operand that has `rows`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from mb_torch.errors import InvalidInput

Rows = tuple[int, ...]
"""Number of real rows of each model; the rest of a model's rows is padding."""


def common_rows(tensors: Sequence[Any]) -> Rows | None:
    """Return the rows that all routed tensors share, `None` without any; differences raise `InvalidInput`."""
    if not tensors:
        return None
    first: Rows = tensors[0].rows
    for tensor in tensors[1:]:
        if tensor.rows != first:
            raise InvalidInput(
                "routed tensors with different real rows are used together",
                received=f"rows {first} and {tensor.rows}",
                fix="Route them in one call (route_batch(inputs, targets=targets)), or use .plain().",
            )
    return first


def real_rows(counts: Tensor, length: int) -> Tensor:
    """`[num_models, length]` bool, true for the first `counts[i]` (`[num_models]`) rows of model i."""
    return torch.arange(length, device=counts.device) < counts[:, None]


@dataclass(frozen=True, eq=False)
class Call:
    """One torch function called on routed tensors, which count as plain ones while it is looked at.

    Attributes:
        func: The function, as torch hands it to `__torch_function__`.
        args: Its positional arguments.
        kwargs: Its other arguments.
        routed: The routed tensors among all arguments, at least one.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    routed: Sequence[Any]

    @property
    def source(self) -> Any:
        """The operand that an operation works on: its first argument."""
        return self.args[0] if self.args else self.kwargs.get("input")

    @property
    def first_alone(self) -> bool:
        """Whether the first argument is the only routed tensor."""
        return len(self.routed) == 1 and self.routed[0] is self.source

    @property
    def name(self) -> str:
        """The function as the user knows it."""
        return str(resolve_name(self.func) or getattr(self.func, "__name__", self.func))

    def rows_of(self, operand: object) -> Rows | None:
        """The rows of a routed operand, `None` of any other."""
        for tensor in self.routed:
            if id(tensor) == id(operand):
                rows: Rows = tensor.rows
                return rows
        return None

    def argument(self, position: int, *names: str) -> Any:
        """The argument given at a position or under a name, else `None`."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)

    def check(self) -> None:
        """Raise before anything is changed if the operands disagree or the rows would stop being true."""
        if self.func not in _MAY_DIFFER:
            common_rows(self.routed)
        name = getattr(self.func, "__name__", "")
        changed = tree_leaves(self.kwargs.get("out"))
        if (name.endswith("_") and not name.endswith("__")) or self.func == _SET_DATA:
            changed.append(self.source)
        allowed = self.func in _WRITES or _RULES.get(self.func) is _each_element
        if not allowed and any(self.rows_of(tensor) is not None for tensor in changed):
            raise InvalidInput(
                f"{self.name} in place could move the rows of a RoutedTensor",
                fix="Use the form that returns a new tensor, or work on .plain().",
            )

    def rows_of_results(self, results: list[Tensor]) -> list[Rows | None]:
        """The rows of each result, `None` for those that carry none."""
        rule = _RULES.get(self.func, _unknown)
        rows = rule(self, results)
        lookalikes = [
            result
            for result, known in zip(results, rows, strict=True)
            if known is None and type(result) is Tensor and self._looks_routed(result)
        ]
        if lookalikes:
            warnings.warn(
                f"{self.name}: the result {list(lookalikes[0].shape)} is a plain tensor, in which padding "
                "counts as data, because real rows cannot be followed through this operation. Attach them "
                "with RoutedTensor.wrap(result, rows) if they are still in place, or use .plain() if they "
                "are not needed.",
                stacklevel=3,
            )
        return rows

    def _looks_routed(self, result: Tensor) -> bool:
        if result.numel() == 0:
            return False
        if _RULES.get(self.func) in (_moved, _joined):
            return bool(result.ndim == self.routed[0].ndim)
        # What a known operation returns with fewer dimensions has lost one of the first two.
        return any(
            _same_lead(result, operand) and (self.func not in _RULES or result.ndim >= operand.ndim)
            for operand in self.routed
        )


_Rule = Callable[[Call, list[Tensor]], "list[Rows | None]"]


def _same_lead(result: Tensor, operand: Tensor) -> bool:
    return result.ndim >= 2 and result.shape[:2] == operand.shape[:2]


def _unknown(call: Call, results: list[Tensor]) -> list[Rows | None]:
    return [None] * len(results)


def _each_element(call: Call, results: list[Tensor]) -> list[Rows | None]:
    """Results are computed element by element, with broadcasting.

    An operand with fewer dimensions than the result was aligned at the end: its first two dimensions are not
    those of the result, whatever their lengths.
    """
    return [
        call.routed[0].rows
        if all(_same_lead(result, operand) and operand.ndim == result.ndim for operand in call.routed)
        else None
        for result in results
    ]


def _as_first(call: Call, results: list[Tensor]) -> list[Rows | None]:
    """Results hold the elements of the first operand, or one item for each (an embedding, a one-hot code)."""
    rows = call.rows_of(call.source)
    return [rows if rows is not None and _same_lead(result, call.source) else None for result in results]


def _right_product(call: Call, results: list[Tensor]) -> list[Rows | None]:
    """Matrix products mix the rows of the right factor, never those of the left one."""
    kept = call.first_alone and call.source.ndim >= 3
    return [
        call.source.rows if kept and _same_lead(result, call.source) and result.ndim <= call.source.ndim else None
        for result in results
    ]


def _along(position: int, default: int | None) -> _Rule:
    """Make the rule of an operation along the dimensions given at a position: each must be a trailing one."""

    def rule(call: Call, results: list[Tensor]) -> list[Rows | None]:
        dims = call.argument(position, "dim", "axis")
        if isinstance(dims, Tensor):  # torch.maximum under its other name, torch.max(x, y)
            return _each_element(call, results)
        dims = default if dims is None else dims
        dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
        ndim = call.routed[0].ndim
        kept = call.first_alone and len(dims) > 0 and all(dim % ndim >= 2 for dim in dims)
        return [call.source.rows if kept else None] * len(results)

    return rule


def _over_last(number: Callable[[Call], int]) -> _Rule:
    """Make the rule of an operation over the last so many dimensions."""

    def rule(call: Call, results: list[Tensor]) -> list[Rows | None]:
        kept = call.first_alone and call.source.ndim - number(call) >= 2
        return [call.source.rows if kept else None] * len(results)

    return rule


def _joined(call: Call, results: list[Tensor]) -> list[Rows | None]:
    """Joined along a trailing dimension, tensors keep the rows; along the models, the rows are joined too."""
    tensors = call.argument(0, "tensors")
    dim = (call.argument(1, "dim", "axis") or 0) % results[0].ndim
    if dim == 0:
        joined: Rows = ()
        for tensor in tensors:
            if tensor.ndim >= 2:  # torch.cat skips empty tensors of one dimension
                joined += call.rows_of(tensor) or (tensor.shape[1],) * tensor.shape[0]
        return [joined]
    rows = common_rows(call.routed)
    return [rows if dim >= 2 else None]


def _gradients(call: Call, results: list[Tensor]) -> list[Rows | None]:
    """Gradients have the rows of the input that they belong to."""
    inputs = tree_leaves(call.argument(1, "inputs"))
    if len(inputs) != len(results):
        return [None] * len(results)
    return [
        call.rows_of(tensor) if tensor.shape == result.shape else None
        for tensor, result in zip(inputs, results, strict=True)
    ]


def _moved(call: Call, results: list[Tensor]) -> list[Rows | None]:
    """Results are copies of elements: row numbers sent through the same operation tell where each is from."""
    source, rest = call.source, call.args[1:]
    if call.rows_of(source) is None:
        return [_rows_of_lookup(call, result) for result in results]
    if any(isinstance(value, torch.dtype) for value in (*rest, *call.kwargs.values())):  # tensor.view(dtype)
        return _each_element(call, results)
    indexed = any(isinstance(leaf, Tensor) for leaf in tree_leaves((rest, call.kwargs)))
    num_models, max_subset = source.shape[:2]
    places = torch.arange(num_models * max_subset, dtype=torch.int32, device=source.device if indexed else "cpu")
    places = places.view(num_models, max_subset, *[1] * (source.ndim - 2)).expand(source.shape)
    moved = tree_leaves(call.func(places, *rest, **call.kwargs))
    return [_rows_at(result_places, source, alone=call.first_alone) for result_places in moved]


def _rows_of_lookup(call: Call, result: Tensor) -> Rows | None:
    """The rows of `table[index]`: those of a routed index."""
    index = call.argument(1)
    rows = call.rows_of(index) if call.func == Tensor.__getitem__ else None
    return rows if rows is not None and index.dtype != torch.bool and _same_lead(result, index) else None


def _rows_at(places: Tensor, source: Any, *, alone: bool) -> Rows | None:
    """The rows of a result, given for each element the source's row (numbered through all models)."""
    if places.ndim < 2 or places.numel() == 0:
        return None
    # A dimension of stride 0 repeats one value, so that only the others need comparing.
    repeated = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in places.stride()[2:])
    rest = places[(slice(None), slice(None), *repeated)].flatten(2) if places.ndim > 2 else places[..., None]
    first = rest[..., 0].long()
    if not bool((rest == rest[..., :1]).all()):
        return None
    rows: Rows = source.rows
    num_models, max_subset = source.shape[:2]
    in_order = torch.arange(num_models * max_subset, device=first.device).view(num_models, max_subset)
    if first.shape == in_order.shape and bool((first == in_order).all()):
        return rows
    models, positions = first // max_subset, first % max_subset
    if not alone or not bool((models == models[:, :1]).all()):
        return None
    # Where a dimension is gone, the second one may no longer be that of the rows, as in tensor[0].
    if places.ndim != source.ndim and not bool((positions[:, :1] != positions[:, 1:2]).any(1).all()):
        return None
    real = positions < torch.tensor(rows, device=first.device)[models]
    counts = real.sum(1)
    first_real = bool((real == real_rows(counts, real.shape[1])).all())
    return tuple(counts.tolist()) if first_real else None


_ELEMENTWISE = """
    abs neg negative positive sign square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p logit
    sigmoid sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh sinc ceil floor round trunc frac
    erf erfc erfinv deg2rad rad2deg nan_to_num add sub subtract mul multiply div divide true_divide
    floor_divide remainder fmod pow float_power hypot lerp addcmul addcdiv maximum minimum fmax fmin clamp
    clip clamp_min clamp_max logaddexp xlogy eq ne lt le gt ge not_equal less less_equal greater greater_equal
    isclose isnan isinf isfinite where masked_fill logical_and logical_or logical_xor logical_not bitwise_and
    bitwise_or bitwise_xor bitwise_not bucketize relu relu6 leaky_relu elu celu selu gelu silu mish softplus
    softsign tanhshrink hardshrink softshrink hardtanh hardsigmoid hardswish logsigmoid threshold dropout
    alpha_dropout bernoulli l1_loss mse_loss smooth_l1_loss huber_loss binary_cross_entropy
    binary_cross_entropy_with_logits kl_div clone detach contiguous cpu cuda type float double half bfloat16
    int long short char byte bool pin_memory requires_grad share_memory zeros_like ones_like empty_like
    full_like rand_like randn_like randint_like __eq__ __rsub__ __rdiv__ __floordiv__ __rfloordiv__ __rmod__
    __rpow__ __invert__ __and__ __or__ __xor__ __iand__ __ior__ __ixor__
"""

_MOVING = """
    __getitem__ permute transpose swapaxes swapdims movedim moveaxis t flip fliplr flipud roll rot90
    reshape reshape_as view view_as flatten unflatten squeeze unsqueeze ravel expand expand_as broadcast_to
    repeat tile repeat_interleave narrow select split chunk tensor_split unbind index_select gather
    take_along_dim unfold
"""

# Position of the argument that names the dimensions, and its default where there is one.
_ALONG_DIMENSIONS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys("sum mean prod amax amin argmax argmin any all nansum nanmean logsumexp".split(), (1, None)),
    **dict.fromkeys("std var std_mean var_mean median nanmedian max min count_nonzero".split(), (1, None)),
    **dict.fromkeys("softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp".split(), (1, None)),
    **dict.fromkeys("sort argsort mode glu".split(), (1, -1)),
    **dict.fromkeys("topk kthvalue".split(), (2, -1)),
    "norm": (2, None),
    "normalize": (2, 1),
}


def _functions(name: str) -> Iterator[Callable[..., Any]]:
    """Every form of an operation: function, method, functional, each also in place."""
    for form in (name, f"{name}_"):
        for space in (torch, Tensor, functional):
            function = getattr(space, form, None)
            if callable(function) and not isinstance(function, type):
                yield function


def _table() -> dict[Callable[..., Any], _Rule]:
    rules: dict[Callable[..., Any], _Rule] = {}
    for name in _ELEMENTWISE.split():
        rules.update(dict.fromkeys(_functions(name), _each_element))
    for name in _MOVING.split():
        rules.update(dict.fromkeys(_functions(name), _moved))
    for name, (position, default) in _ALONG_DIMENSIONS.items():
        rules.update(dict.fromkeys(_functions(name), _along(position, default)))
    for function in (Tensor.to, Tensor.type_as, functional.embedding, functional.one_hot):
        rules[function] = _as_first
    for name in ("matmul", "bmm", "linear", "__matmul__"):
        rules.update(dict.fromkeys(_functions(name), _right_product))
    for name in ("cat", "concat", "concatenate"):
        rules.update(dict.fromkeys(_functions(name), _joined))
    for name in ("T", "mT"):
        rules[getattr(Tensor, name).__get__] = _moved
    for name in ("data", "grad"):
        rules[getattr(Tensor, name).__get__] = _each_element
    rules[functional.pad] = _over_last(lambda call: len(call.argument(1, "pad")) // 2)
    rules[functional.layer_norm] = _over_last(lambda call: len(call.argument(1, "normalized_shape")))
    rules[torch.autograd.grad] = _gradients
    return rules


_RULES = _table()

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

# Writes in place: real rows are defined by their position, so new values leave the rows as they were.
_WRITTEN = "zero fill copy normal uniform random bernoulli masked_fill detach requires_grad share_memory"
_WRITES = {getattr(Tensor, f"{name}_") for name in _WRITTEN.split()}

_MAY_DIFFER = {torch.cat, torch.concat, torch.concatenate, torch.autograd.grad}
