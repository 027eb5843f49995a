"""What a backend must provide, and how one is found by name.

A backend is an object held by one `ModelBatch`, never a process-wide switch, so batches on different backends live in
one script. This file imports no backend: each is loaded from its registered path at first use.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mb_torch.errors import InvalidInput, MissingPackage, Unsupported
from mb_torch.random_streams import RandomStreams
from mb_torch.state import StackedState

if TYPE_CHECKING:
    from mb_torch.amp import GradScaler

ENVIRONMENT_VARIABLE = "MODELBATCH_BACKEND"
DEFAULT_BACKEND = "torch"

_REGISTRY: dict[str, str] = {
    "torch": "mb_torch.vmap.engine:VmapBackend",
    "jax": "mb_jax.engine:JaxBackend",
}
# Extras of this distribution that bring what a backend needs.
_EXTRAS = {"jax": "jax"}
# Functions `(rank, size, address)` that connect processes; a backend without one runs in one process.
_CONNECTORS = {"jax": "mb_jax.sharding:init_distributed"}
# Of this process among those that were connected.
_rank = 0


@dataclass(frozen=True)
class Capabilities:
    """What callers may ask of a backend; they test a flag, never the backend's name.

    Attributes:
        torch_compile: ``enable_compile`` has an effect.
        ragged_rows: Models may have different numbers of real rows in one batch.
        survives_fork: Processes may be forked after the backend has run. One that computes in threads of its own does
            not: a forked process lacks them, but not the locks they held.
    """

    torch_compile: bool = False
    ragged_rows: bool = False
    survives_fork: bool = True


@dataclass
class BatchSpec:
    """Everything a backend is made from.

    Attributes:
        prototype: The definition, one model on the meta device. Its ``training`` flags and settings are live.
        state: The stacked parameters and buffers.
        num_models: How many models there are.
        chunk_size: At most so many models run at once; None is all of them.
        streams: Per-model random streams, or None for torch's global generator.
        options: Options of the backend itself.
    """

    prototype: nn.Module
    state: StackedState
    num_models: int
    chunk_size: int | None = None
    streams: RandomStreams | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepSpec:
    """A training step over one or more batches of equally many models; the arguments of `make_joint_step`.

    Attributes:
        loss_fn: ``loss_fn(*models, inputs, targets, **loss_args, **shared_args)`` for one model of each batch.
        optimizers: One per batch; None leaves that batch untrained.
        loss_args: ``[num_models, ...]`` tensors, one entry per model; live.
        shared_args: The same for every model; live.
        clip_norm: Largest gradient norm, one number or ``[num_models]``; None does not clip.
        accumulate: How many calls make one update.
        active: ``[num_models]`` bool; the others are frozen wholly. None is all; live.
        scaler: Loss scaling for float16.
        aux: Whether ``loss_fn`` returns ``(loss, aux)``.
        shared_input: Whether all models get the same inputs.
    """

    loss_fn: Callable[..., Any]
    optimizers: Sequence[torch.optim.Optimizer | None]
    loss_args: dict[str, Tensor] = field(default_factory=dict)
    shared_args: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | Tensor | None = None
    accumulate: int = 1
    active: Tensor | None = None
    scaler: GradScaler | torch.amp.GradScaler | None = None
    aux: bool = False
    shared_input: bool = True


class Step(Protocol):
    """A training step; `mb_torch.TrainStep` wraps it for users."""

    def __call__(self, inputs: Any, targets: Any, *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step; return the losses ``[num_models]``, detached, and what the loss returned besides."""

    def run(self, batches: Sequence[tuple[Any, Any]], *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step per batch; return losses ``[steps, num_models]`` and the last step's aux."""

    def run_rows(self, inputs: Any, targets: Any, rows: Tensor, *, shared_targets: bool) -> tuple[Tensor, Any]:
        """Run one step per entry of ``rows`` ``[steps, batch]`` on rows of a data set; results as of `run`."""

    def flush(self) -> None:
        """Make an update of gradients accumulated so far, if there are any."""


class Backend(Protocol):
    """Runs the models of one batch. Tensors in and out are torch tensors; leading axis ``num_models``."""

    name: str
    capabilities: Capabilities

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, per_model: bool) -> Any:
        """Run all models; ``per_model`` says that every tensor leaf has a leading model axis."""

    def losses(
        self,
        loss_fn: Callable[..., Tensor],
        outputs: Any,
        targets: Any,
        *,
        shared_targets: bool,
    ) -> Tensor:
        """Evaluate one loss per model, ``[num_models]``, each on its real rows only."""

    def make_optimizer(
        self, optimizer_cls: type[torch.optim.Optimizer], configs: Sequence[Mapping[str, Any]]
    ) -> torch.optim.Optimizer:
        """Return an optimizer with one live parameter group per model."""

    def make_step(self, spec: StepSpec, backends: Sequence[Backend]) -> Step:
        """Return a fused training step over the batches of ``backends``, this one among them."""

    def enable_compile(self, **kwargs: Any) -> None:
        """Compile the vectorised function from now on."""

    def to_flax(self) -> Any:
        """Return the models as one flax module with copies of the stacks, or raise `Unsupported`."""

    def load_flax(self, module: Any) -> None:
        """Copy a flax module's variables into the stacks, all or none, or raise `Unsupported`."""

    def report(self) -> dict[str, Any]:
        """Say how the models are run."""


def register_backend(name: str, path: str) -> None:
    """Make a backend known under a name.

    Args:
        name: What users pass as ``backend=``.
        path: ``"package.module:attribute"``, a callable ``(BatchSpec) -> Backend``; imported at first use.

    Example:
        >>> register_backend("torch", "mb_torch.vmap.engine:VmapBackend")
    """
    if path.count(":") != 1:
        raise InvalidInput(f"backend {name!r}", received=repr(path), expected="'package.module:attribute'")
    _REGISTRY[name] = path


def available_backends() -> list[str]:
    """Names that ``backend=`` accepts.

    Example:
        >>> "torch" in available_backends()
        True
    """
    return sorted(_REGISTRY)


def resolve_backend_name(name: str | None) -> str:
    """Return the backend to use: the given name, else ``$MODELBATCH_BACKEND``, else ``"torch"``."""
    source = "backend" if name is not None else f"environment variable {ENVIRONMENT_VARIABLE}"
    chosen = name or os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_BACKEND
    if chosen not in _REGISTRY:
        raise InvalidInput(source, received=repr(chosen), expected=f"one of {available_backends()}")
    return chosen


def create_backend(name: str, spec: BatchSpec) -> Backend:
    """Load the named backend and make one for the given models.

    Raises:
        MissingPackage: Names a package that the backend needs, and the command that installs it.
    """
    factory: Callable[[BatchSpec], Backend] = _load(name, _REGISTRY[name])
    return factory(spec)


def _load(backend: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if backend not in _EXTRAS or missing == module.partition(".")[0]:
            raise
        raise MissingPackage(
            f"backend={backend!r} needs the package {missing}",
            fix=f"Run: pip install 'modelbatch-hybrid[{_EXTRAS[backend]}]'",
        ) from error


def init_distributed(
    backend: str | None = None, rank: int | None = None, size: int | None = None, address: str | None = None
) -> None:
    """Connect the processes of a job, so that a batch of models is spread over the devices of all of them.

    Every process runs the same script, calls this once before its first `ModelBatch`, and builds the same batch from
    the same seeds. Each then trains the models of its own devices; losses reach all. Whatever reads weights, states
    or outputs has to be done by all processes, though one may write the files.

    Args:
        backend: As in `ModelBatch`.
        rank: Number of this process, from 0. Default: ``$SLURM_PROCID``.
        size: How many processes there are. Default: ``$SLURM_NTASKS``.
        address: ``host:port`` where process 0 listens. Default: the first host of ``$SLURM_STEP_NODELIST`` or
            ``$SLURM_JOB_NODELIST``, and a port that follows from ``$SLURM_JOB_ID``.

    Raises:
        InvalidInput: An argument is neither given nor in the environment, or out of range.
        MissingPackage: The backend needs a package that is not installed.
        Unsupported: The backend runs in one process only, or has been used before.

    Example:
        >>> init_distributed("jax", rank=0, size=1, address="localhost:1234")  # one process: nothing to connect
    """
    name = resolve_backend_name(backend)
    if name not in _CONNECTORS:
        raise Unsupported(
            f"init_distributed: backend={name!r} runs in one process",
            fix=f"Use one of {sorted(_CONNECTORS)}, or give every process models of its own.",
        )
    rank = _from_slurm("rank", "SLURM_PROCID") if rank is None else rank
    size = _from_slurm("size", "SLURM_NTASKS") if size is None else size
    if not 0 <= rank < size:
        raise InvalidInput("init_distributed", received=f"rank {rank} of {size}", expected="0 <= rank < size")
    _load(name, _CONNECTORS[name])(rank, size, _slurm_address() if address is None else address)
    global _rank
    _rank = rank


def process_rank() -> int:
    """Return the number of this process among those that `init_distributed` connected; 0 without it.

    Returns:
        The rank. Process 0 is the one to write files.

    Example:
        >>> process_rank()
        0
    """
    return _rank


def _from_slurm(argument: str, variable: str) -> int:
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise InvalidInput(
            f"init_distributed: {argument} is not given and ${variable}",
            received=repr(text) if text else "nothing",
            expected="a number",
            fix="Start the processes with srun, or pass rank=, size= and address=.",
        )
    return int(text)


def _slurm_address() -> str:
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise InvalidInput(
            "init_distributed: address is not given, nor $SLURM_STEP_NODELIST, nor $SLURM_JOB_NODELIST",
            fix="Start the processes with srun, or pass address='host:port' of process 0.",
        )
    # Above the ports that systems hand out by themselves.
    port = 61440 + _from_slurm("address", "SLURM_JOB_ID") % 4096
    return f"{_first_host(hosts)}:{port}"


def _first_host(hosts: str) -> str:
    """The first of a list as Slurm writes it: ``"gpu[03-04,7],other"`` starts with ``gpu03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else hosts)
