"""How many models of a batch fit into memory, by what one of them needs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainers.built import Built
from trainers.packed.first_batch import first_batch
from trainers.training import device_of

_MEMORY_INFO = Path("/proc/meminfo")
# Of what is free, how much one batch may take: temporaries, and what else the machine does.
SHARE = 0.5
# Copies of the parameters: themselves, gradients, two of Adam's, and one in passing.
_COPIES = 5
# What PyTorch says on a CPU, and XLA anywhere, in errors that have no class of their own.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "RESOURCE_EXHAUSTED")
# Of control groups in version 2 and 1: the folder of the root group, and the names of its limit and its use.
_GROUPS = Path("/proc/self/cgroup")
_VERSION_2 = (Path("/sys/fs/cgroup"), "memory.max", "memory.current")
_VERSION_1 = (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")


def models_that_fit(built: Built, packs_at_once: int = 1) -> int:
    """Return how many such experiments can train at once, at least one.

    One forward pass of the model shows what it keeps for its backward pass.

    Args:
        built: One of the experiments.
        packs_at_once: How many processes share the memory.

    Returns:
        Free memory of the model's device over what a model needs, with room to spare.

    Example:
        >>> batches = [(torch.ones(8, 4), torch.zeros(8, 2))]
        >>> models_that_fit(Built(torch.nn.Linear(4, 2), torch.nn.functional.mse_loss, batches)) > 100
        True
    """
    return max(1, int(SHARE / packs_at_once * free_memory(device_of(built.model)) / max(bytes_of(built), 1)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the host or of an accelerator.

    Args:
        error: The error; what caused it counts as well.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
        True
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def bytes_of(built: Built) -> int:
    """Return the bytes that one such experiment needs while it trains.

    Args:
        built: The experiment.
    """
    own = sum(parameter.numel() * parameter.element_size() for parameter in built.model.parameters())
    return _COPIES * own + _kept_for_backward(built)


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that this process may still take.

    Args:
        device: Whose memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMORY_INFO.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # only what there is at all
    lines = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text().splitlines())
    return min([1024 * int(lines["MemAvailable"].split()[0]), *_left_in_group()])


def _left_in_group() -> list[int]:
    """What the limits of this process's control groups leave, as batch systems and containers set them."""
    try:
        lines = [line.split(":", 2) for line in _GROUPS.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for number, controllers, group in lines:
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root, *names = _VERSION_2 if number == "0" else _VERSION_1
        own = root / group.lstrip("/")
        # A limit of an outer group holds for those in it. In a container the path may be one of the host's.
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                left += _left_in(folder, *names)
    return left


def _left_in(folder: Path, limit_name: str, use_name: str) -> list[int]:
    try:
        limit, used = (int((folder / name).read_text()) for name in (limit_name, use_name))
    except (OSError, ValueError):
        return []  # no such group, or no limit
    return [max(limit - used, 0)]


def _kept_for_backward(built: Built) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs, targets = first_batch(built)
    # The state of the model and of the generators stays as it was.
    state = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        built.loss_fn(built.model(inputs), targets, **(built.loss_args or {}))
    built.model.load_state_dict(state)
    leaves = pytree.tree_leaves((inputs, targets))
    shared = {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}
    own = {parameter.untyped_storage().data_ptr() for parameter in built.model.parameters()}
    return sum(size for storage, size in kept.items() if storage not in shared | own)
