"""The same trainings twice: all models at once, and one after another in plain PyTorch.

Both get the same initial weights, the same batches in the same order and the same hyper-parameters, so their
results can be compared and their times make an honest ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cli.datasets import ImageData
from cli.errors import CommandError
from mb_torch import ModelBatch, OptimizerFactory

# Bounds the memory for activations of all models together; the digits fit into one piece.
VALIDATION_ROWS = 1000

Report = Callable[["History"], None]


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and in which order.

    Attributes:
        data: The images.
        make_model: Returns a fresh model with random weights.
        configs: Options of ``torch.optim.AdamW``, one dict per model.
        seeds: Seeds of the initial weights, one per model.
        order: Rows of each training batch, ``[epochs, steps, batch]``.
    """

    data: ImageData
    make_model: Callable[[], nn.Module]
    configs: Sequence[dict[str, float]]
    seeds: Sequence[int]
    order: Tensor

    @property
    def num_models(self) -> int:
        """How many models are trained."""
        return len(self.configs)


@dataclass
class History:
    """What was measured after each epoch. A training of one model has ``num_models`` 1.

    Attributes:
        train_loss: Mean over the epoch's batches, ``[num_models]`` an epoch.
        validation_loss: ``[num_models]`` an epoch.
        validation_accuracy: Fraction of right answers, ``[num_models]`` an epoch.
        seconds: Of each epoch, training and validation.
    """

    train_loss: list[Tensor] = field(default_factory=list)
    validation_loss: list[Tensor] = field(default_factory=list)
    validation_accuracy: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def total_seconds(self) -> float:
        """Of the whole run."""
        return sum(self.seconds)

    @property
    def start_up_seconds(self) -> float | None:
        """How much longer the first epoch took than the others usually did; unknown after a single epoch."""
        if len(self.seconds) < 2:
            return None
        return max(0.0, self.seconds[0] - statistics.median(self.seconds[1:]))


def make_order(num_rows: int, batch_size: int, epochs: int, seed: int) -> Tensor:
    """Return the rows of each batch, ``[epochs, steps, batch]``, shuffled anew each epoch.

    A last, smaller batch is left out; the shuffle puts other rows into it each time.

    Raises:
        CommandError: There are fewer rows than fill one batch.
    """
    steps = num_rows // batch_size
    if steps == 0:
        raise CommandError(f"--batch-size {batch_size} is more than the {num_rows} training images")
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(num_rows, generator=generator)[: steps * batch_size] for _ in range(epochs)]
    return torch.stack(shuffled).view(epochs, steps, batch_size)


def train_at_once(
    task: Task,
    *,
    backend: str | None = None,
    compiled: bool = False,
    on_step: Callable[[], None] = lambda: None,
    on_epoch: Report = lambda history: None,
) -> tuple[ModelBatch, History]:
    """Train all models of the task together.

    Args:
        task: What to train.
        backend: As for `ModelBatch`.
        compiled: Whether to use ``torch.compile``.
        on_step: Called after each training step.
        on_epoch: Called after each epoch with the history so far.

    Returns:
        The trained models and what was measured.
    """
    data = task.data
    mb = ModelBatch.from_factory(task.make_model, task.seeds, backend=backend)
    if compiled:
        mb.enable_compile()
    optimizer = OptimizerFactory(torch.optim.AdamW).create_optimizer(mb, task.configs)
    step = mb.make_train_step(cross_entropy, optimizer)
    history = History()
    for batches in task.order:
        started = time.perf_counter()
        mb.train()
        losses = []
        for rows in batches:
            losses.append(step(data.train_inputs[rows], data.train_targets[rows]))
            on_step()
        history.train_loss.append(torch.stack(losses).mean(0))
        mb.eval()
        _validate(mb, data, history)
        history.seconds.append(time.perf_counter() - started)
        on_epoch(history)
    return mb, history


def train_alone(task: Task, index: int) -> tuple[nn.Module, History]:
    """Train one model of the task as anybody would in plain PyTorch.

    Args:
        task: What to train.
        index: Which of its models.

    Returns:
        The trained model and what was measured.
    """
    data = task.data
    with torch.random.fork_rng():
        torch.manual_seed(task.seeds[index])
        model = task.make_model()
    config = task.configs[index]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    history = History()
    for batches in task.order:
        started = time.perf_counter()
        model.train()
        losses = []
        for rows in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(data.train_inputs[rows]), data.train_targets[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        history.train_loss.append(torch.stack(losses).mean(0, keepdim=True))
        model.eval()
        _validate(model, data, history)
        history.seconds.append(time.perf_counter() - started)
    return model, history


@torch.no_grad()
def _validate(model: nn.Module, data: ImageData, history: History) -> None:
    """Measure one model, or all of a `ModelBatch`, on the validation images."""
    losses, right = [], []
    pieces = zip(
        data.validation_inputs.split(VALIDATION_ROWS), data.validation_targets.split(VALIDATION_ROWS), strict=True
    )
    for inputs, targets in pieces:
        scores = model(inputs).reshape(-1, len(inputs), data.num_classes)
        log_probabilities = scores.log_softmax(-1)
        losses.append(-log_probabilities[:, torch.arange(len(targets)), targets].sum(1))
        right.append((scores.argmax(-1) == targets).sum(1))
    rows = len(data.validation_targets)
    history.validation_loss.append(torch.stack(losses).sum(0) / rows)
    history.validation_accuracy.append(torch.stack(right).sum(0) / rows)
