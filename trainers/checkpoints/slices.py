"""Checkpoints of a `ModelBatch` by models: some of them, those of several batches together, one as if trained alone.

What is cut and joined is the content that `read_checkpoint` returns. It is the same for every backend. Each model keeps
its weights, buffers, random stream, optimizer state, schedule, loss scale, early stopping and metrics; what belongs to
the run (its place, loaders, generators, callbacks, trackers) stays as it is.

Example:
    >>> import tempfile
    >>> from pathlib import Path
    >>> from torch import nn
    >>> from mb_torch import ModelBatch, OptimizerFactory
    >>> from trainers.checkpoints.files import read_checkpoint
    >>> from trainers.generic import GenericTrainer
    >>> from trainers.settings import GenericTrainerConfig
    >>> batch = ModelBatch([nn.Linear(2, 1) for _ in range(3)])
    >>> optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = GenericTrainerConfig(checkpoint_dir=folder, max_epochs=1)
    ...     trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
    ...     trainer.fit(batch, optimizer, [(torch.ones(4, 2), torch.zeros(4, 1))])
    ...     content = read_checkpoint(Path(folder) / "latest.ckpt")
    >>> last_and_first = select_models(content, [2, 0])
    >>> [group["lr"] for group in last_and_first["optimizer_state_dict"]["param_groups"]]
    [0.3, 0.1]
    >>> join([last_and_first, select_models(content, [1])])["model_state_dict"]["stack.weight"].shape
    torch.Size([3, 1, 2])
    >>> own = model_content(content, 1)
    >>> alone = nn.Linear(2, 1)
    >>> alone.load_state_dict(own["model_state_dict"])
    <All keys matched successfully>
    >>> torch.optim.Adam(alone.parameters()).load_state_dict(own["optimizer_state_dict"])
    >>> sorted(own["metrics"])
    ['loss']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainers.checkpoints.slice_metrics import (
    are_same,
    counted_models,
    differ,
    join_early,
    join_metrics,
    join_sums,
    own_metrics,
    own_sums,
    select_early,
    select_metrics,
    select_sums,
    with_sums,
)
from trainers.errors import TrainerError

Content = dict[str, Any]
T = TypeVar("T")

_STACK, _SEEDS, _STEPS = "stack.", "streams.seeds", "streams.steps"
# What a scheduler that moves several parameter groups keeps for each of them.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def select_models(content: Mapping[str, Any], indices: Sequence[int]) -> Content:
    """Return the checkpoint of a batch of some of the models, in the given order.

    A run that goes on from it, with a batch, optimizer and schedulers of these models, trains them as the run of all
    would have. Means over the models are computed anew, over those that did not diverge. The best checkpoint so far
    is forgotten: it was the best of other models.

    Args:
        content: Of a `ModelBatch` whose optimizer was made by `OptimizerFactory`.
        indices: Which models, each once.

    Returns:
        The content for ``len(indices)`` models. It shares no tensors of theirs with ``content``, unless it is the same.

    Raises:
        TrainerError: There is no such model, or it is no checkpoint of such a batch.
    """
    count = num_models(content)
    chosen = _checked_indices(indices, count)
    if chosen == list(range(count)):
        return dict(content)
    early = select_early(content["early_stopping"], chosen)
    counted = counted_models(early, len(chosen))
    return {
        **content,
        "model_state_dict": _rows(content["model_state_dict"], chosen),
        "optimizer_state_dict": _if_there(
            content["optimizer_state_dict"], lambda state: _stacked([_own_optimizer(state, model) for model in chosen])
        ),
        "scheduler_state_dict": _if_there(
            content["scheduler_state_dict"], lambda states: _select_schedulers(states, chosen, count)
        ),
        "classes": _select_classes(content, chosen, count),
        "scaler_state_dict": _if_there(content["scaler_state_dict"], lambda state: _rows(state, chosen)),
        "early_stopping": early,
        "metrics": select_metrics(content["metrics"], chosen, count, counted),
        "resume_state": with_sums([content["resume_state"]], lambda sums: select_sums(sums[0], chosen, counted)),
        "best": None,
    }


def join(contents: Sequence[Mapping[str, Any]]) -> Content:
    """Return the checkpoint of one batch of the models of several, in order.

    Callbacks, trackers and settings are those of the first. Means over the models are computed anew, over those that
    did not diverge; a metric that is not per model is averaged, by the number of models.

    Args:
        contents: Of batches that stand at the same place and would go on with the same data.

    Returns:
        The content for all the models.

    Raises:
        TrainerError: There is none; they stand at different places; or their models, optimizers or schedulers differ in
            more than numbers.
    """
    if not contents:
        raise TrainerError("checkpoints to be joined", received="none", expected="at least one")
    counts = [num_models(content) for content in contents]
    first = contents[0]
    if len(contents) == 1:
        return dict(first)
    _check_same_place(contents)
    early = join_early([content["early_stopping"] for content in contents], counts)
    counted = counted_models(early, sum(counts))

    def joined(key: str, join_parts: Callable[[list[Any]], Any]) -> Any:
        parts = [content[key] for content in contents]
        if all(part is None for part in parts):
            return None
        if any(part is None for part in parts):
            raise differ(key, "in some of them only", "in all or in none")
        return join_parts(parts)

    return {
        **first,
        "save_timestamp": max(content["save_timestamp"] for content in contents),
        "model_state_dict": joined("model_state_dict", _join_stacks),
        "optimizer_state_dict": joined("optimizer_state_dict", _join_optimizers),
        "scheduler_state_dict": joined("scheduler_state_dict", lambda parts: _join_schedulers(parts, counts)),
        "scaler_state_dict": joined("scaler_state_dict", _join_scalers),
        "classes": _join_classes(contents, counts),
        "early_stopping": early,
        "metrics": joined("metrics", lambda parts: join_metrics(parts, counts, counted)),
        "resume_state": with_sums(
            [content["resume_state"] for content in contents], lambda sums: join_sums(sums, counts, counted)
        ),
        "preemption_count": max(content["preemption_count"] for content in contents),
        "best": None,
    }


def model_content(content: Mapping[str, Any], index: int) -> Content:
    """Return the checkpoint of one model, as if it had been trained alone by plain PyTorch.

    A plain module loads ``model_state_dict``; a plain optimizer of the same class, over the parameters that require
    gradients, loads ``optimizer_state_dict``; a `GenericTrainer` of both goes on from the whole.

    Args:
        content: Of a `ModelBatch` whose optimizer was made by `OptimizerFactory`.
        index: Which model.

    Returns:
        A content of the same format without model axis, which shares no tensors of the model with ``content``. In
        addition ``"random_stream"``: seed and step of the model's random stream, None without ``seeds``.

    Raises:
        TrainerError: There is no such model, or it is no checkpoint of such a batch.
    """
    count = num_models(content)
    (model,) = _checked_indices([index], count)
    stacks = content["model_state_dict"]
    streams = {"seed": int(stacks[_SEEDS][model]), "step": int(stacks[_STEPS][model])} if _SEEDS in stacks else None
    return {
        **content,
        "model_state_dict": {
            name.removeprefix(_STACK): stack[model].clone() for name, stack in stacks.items() if name.startswith(_STACK)
        },
        "optimizer_state_dict": _if_there(content["optimizer_state_dict"], lambda state: _own_optimizer(state, model)),
        "scheduler_state_dict": _if_there(
            content["scheduler_state_dict"], lambda states: _select_schedulers(states, [model], count)
        ),
        "classes": _select_classes(content, [model], count),
        "scaler_state_dict": _if_there(content["scaler_state_dict"], lambda state: _own_scaler(state, model)),
        "early_stopping": select_early(content["early_stopping"], [model]),
        "metrics": own_metrics(content["metrics"], model, count),
        "resume_state": with_sums([content["resume_state"]], lambda sums: own_sums(sums[0], model)),
        "best": None,
        "random_stream": streams,
    }


def num_models(content: Mapping[str, Any]) -> int:
    """Return how many models a checkpoint holds.

    Args:
        content: Of a `ModelBatch` whose optimizer was made by `OptimizerFactory`.

    Raises:
        TrainerError: It is of something else.

    Example:
        >>> num_models({"model_state_dict": {"stack.weight": torch.zeros(3, 1, 2)}, "optimizer_state_dict": None})
        3
    """
    stacks = content["model_state_dict"]
    lengths = {len(stack) if isinstance(stack, Tensor) and stack.dim() else None for stack in stacks.values()}
    strangers = [name for name in stacks if not name.startswith(_STACK) and name not in (_SEEDS, _STEPS)]
    (count,) = lengths if len(lengths) == 1 else (None,)
    if strangers or count is None:
        raise TrainerError(
            "the model of the checkpoint", received=f"the state of {strangers or [*stacks]}", expected="a ModelBatch"
        )
    optimizer = content["optimizer_state_dict"]
    if optimizer is not None and len(optimizer["param_groups"]) != count:
        raise TrainerError(
            "the optimizer of the checkpoint",
            received=f"{len(optimizer['param_groups'])} parameter groups",
            expected=f"{count}, one per model",
            fix="Make the optimizer with OptimizerFactory.",
        )
    return count


def _checked_indices(indices: Sequence[int], count: int) -> list[int]:
    chosen = list(indices)
    if not chosen or len(set(chosen)) != len(chosen) or any(type(i) is not int or not 0 <= i < count for i in chosen):
        raise TrainerError(
            "models of a checkpoint", received=repr(indices), expected=f"numbers from 0 to {count - 1}, each once"
        )
    return chosen


def _if_there(value: Any, function: Callable[[Any], T]) -> T | None:
    return None if value is None else function(value)


def _check_same_place(contents: Sequence[Mapping[str, Any]]) -> None:
    places = [_place(content) for content in contents]
    for place in places[1:]:
        for key, value in places[0].items():
            if not are_same(place[key], value):
                is_shown = isinstance(value, (int, str))
                raise TrainerError(
                    f"checkpoints to be joined stand at different places: {key}",
                    received=repr(place[key]) if is_shown else "another one",
                    expected=f"{value!r}, as in the first" if is_shown else "that of the first",
                    fix="Join checkpoints that were written after the same step, of runs over the same data.",
                )


def _place(content: Mapping[str, Any]) -> dict[str, Any]:
    """What runs must have in common to go on as one."""
    resume = content["resume_state"]
    place = {key: resume[key] for key in ("phase", "epoch", "global_step", "version")}
    for part in ("train", "val"):
        own = resume[part] or {}
        place |= {f"{part}.{key}": own.get(key, "none") for key in ("batch_idx", "num_samples")}
    return {**place, "rng": resume["rng"], **{key: content[key] for key in ("loader_state", "other_ranks")}}


def _rows(state: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """The chosen models of a state whose tensors are per model."""
    return {key: value[list(chosen)] if isinstance(value, Tensor) else value for key, value in state.items()}


def _join_stacks(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    forms = [{name: (stack.dtype, tuple(stack.shape[1:])) for name, stack in state.items()} for state in states]
    for form in forms[1:]:
        names = sorted(name for name in form.keys() | forms[0].keys() if form.get(name) != forms[0].get(name))
        if names:
            raise differ("their models", f"{names} of other shapes or in one of them only", "one architecture")
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def _own_optimizer(state: Mapping[str, Any], model: int) -> dict[str, Any]:
    """One model's optimizer state, as a plain optimizer has it."""
    group = state["param_groups"][model]
    own = {new: state["state"][old] for new, old in enumerate(group["params"]) if old in state["state"]}
    groups = [{**group, "params": list(range(len(group["params"])))}]
    return {"state": _copied(own), "param_groups": _copied(groups)}


def _copied(value: Any) -> Any:
    """Plain data with tensors of its own: a file of a slice would hold the whole stack."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(entry) for entry in value)
    return value


def _stacked(owns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The optimizer state of a batch, of those of its models."""
    result: dict[str, Any] = {"state": {}, "param_groups": []}
    first = 0
    for own in owns:
        (group,) = own["param_groups"]
        after = first + len(group["params"])
        result["state"].update({first + position: entry for position, entry in own["state"].items()})
        result["param_groups"].append({**group, "params": list(range(first, after))})
        first = after
    return result


def _join_optimizers(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    owns = [_own_optimizer(state, model) for state in states for model in range(len(state["param_groups"]))]
    forms = [(len(own["param_groups"][0]["params"]), sorted(own["param_groups"][0])) for own in owns]
    for form in forms[1:]:
        if form != forms[0]:
            raise differ("their optimizers", f"{form[0]} parameters and the options {form[1]}", f"{forms[0]}")
    return _stacked(owns)


def _select_classes(content: Mapping[str, Any], chosen: Sequence[int], count: int) -> dict[str, Any] | None:
    """The classes of what `select_models` keeps; None in checkpoints of earlier versions, which do not say them."""
    classes, states = content.get("classes"), content["scheduler_state_dict"]
    if classes is None or states is None or not _are_per_model(states, count):
        return classes
    return {**classes, "schedulers": [classes["schedulers"][model] for model in chosen]}


def _join_classes(contents: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any] | None:
    """The classes of all; None where a checkpoint of an earlier version does not say them."""
    known = [content["classes"] for content in contents if content.get("classes") is not None]
    if len(known) < len(contents):
        return None
    if len({part["optimizer"] for part in known}) > 1:
        raise differ("their optimizers", [part["optimizer"] for part in known], "one class")
    names, states = [part["schedulers"] for part in known], [content["scheduler_state_dict"] for content in contents]
    if None not in states and _are_joined_per_model(states, counts):
        return {**known[0], "schedulers": [name for own in names for name in own]}
    if None not in states and any(own != names[0] for own in names):
        raise differ("their schedulers", names, "those of the first in all")
    return known[0]


def _join_scalers(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    settings = [{key: value for key, value in state.items() if not isinstance(value, Tensor)} for state in states]
    for own in settings[1:]:
        if own != settings[0]:
            raise differ("loss scaling", own, f"{settings[0]}, as in the first")
    return {
        key: torch.cat([state[key] for state in states]) if isinstance(value, Tensor) else value
        for key, value in states[0].items()
    }


def _own_scaler(state: Mapping[str, Any], model: int) -> dict[str, Any]:
    """As ``torch.amp.GradScaler`` has it."""
    if not state:
        return {}
    settings = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    return {
        **settings,
        "scale": float(state["scales"][model]),
        "_growth_tracker": int(state["growth_tracker"][model]),
    }


def _select_schedulers(states: Sequence[Mapping[str, Any]], chosen: Sequence[int], count: int) -> list[Any]:
    if _are_per_model(states, count):
        return [states[model] for model in chosen]
    return [_select_groups(state, chosen) for state in states]


def _are_per_model(states: Sequence[Mapping[str, Any]], count: int) -> bool:
    """Whether there is one scheduler for each model, rather than schedulers of all models."""
    groups = {number for number in map(_num_groups, states) if number is not None}
    if len(states) == count and groups <= {1}:
        return True
    if groups <= {count}:
        return False
    raise TrainerError(
        "the schedulers of the checkpoint",
        received=f"{len(states)} over {sorted(groups)} parameter groups",
        expected=f"one for each of {count} models, or each of them for all models",
    )


def _num_groups(state: Mapping[str, Any]) -> int | None:
    """How many parameter groups a scheduler moves; None if its state does not tell."""
    return next((len(state[key]) for key in _PER_GROUP if isinstance(state.get(key), (list, tuple))), None)


def _select_groups(state: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    selected = dict(state)
    for key, value in state.items():
        if key in _PER_GROUP and isinstance(value, (list, tuple)):
            selected[key] = [value[model] for model in chosen]
        elif key == "_schedulers":
            selected[key] = [_select_groups(part, chosen) for part in value]
    return selected


def _join_schedulers(parts: Sequence[Sequence[Mapping[str, Any]]], counts: Sequence[int]) -> list[Any]:
    if _are_joined_per_model(parts, counts):
        return [state for states in parts for state in states]
    if len({len(states) for states in parts}) > 1:
        raise differ("their schedulers", f"{[len(states) for states in parts]} of them", "as many in all")
    return [_join_groups(states) for states in zip(*parts, strict=True)]


def _are_joined_per_model(parts: Sequence[Sequence[Mapping[str, Any]]], counts: Sequence[int]) -> bool:
    """Whether there is one scheduler for each model in all of them."""
    # A batch of one model with one scheduler does not tell. A LambdaLR is taken for one of all models there, because
    # that is what `make_schedulers` makes.
    sizes = zip(parts, counts, strict=True)
    known = {_are_per_model(states, count) for states, count in sizes if (len(states), count) != (1, 1)}
    if len(known) > 1:
        raise differ("their schedulers", "one for each model in some, for all in others", "one or the other")
    return known.pop() if known else "lr_lambdas" not in parts[0][0]


def _join_groups(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = states[0]
    if any(state.keys() != first.keys() for state in states):
        raise differ("their schedulers", [sorted(state) for state in states], "schedulers of one class")
    result = {}
    for key, value in first.items():
        values = [state[key] for state in states]
        if key in _PER_GROUP and isinstance(value, (list, tuple)):
            result[key] = [entry for own in values for entry in own]
        elif key == "_schedulers":
            result[key] = [_join_groups(parts) for parts in zip(*values, strict=True)]
        elif all(are_same(own, value) for own in values):
            result[key] = value
        else:
            raise differ(f"{key!r} of a scheduler of all models", values, "the same in all")
    return result
