"""Was it the same computation, and how much faster? The models of a finished run, trained one after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cli.training import History, Task, train_alone, train_at_once

# In float64 both ways must agree to this after so many steps. In float32 they cannot for long: sums are rounded in
# another order, AdamW divides small gradients by their own size, and training doubles any difference again and again.
CHECKED_STEPS = 20
WEIGHT_TOLERANCE = 1e-9
# After a whole run in float32 the same model may so answer a few validation images differently.
ACCURACY_TOLERANCE = 0.02


@dataclass(frozen=True)
class Comparison:
    """Times and differences of the models that were also trained alone.

    Attributes:
        models: Which ones, rising.
        measured_seconds: How long these took, one after another.
        loop_seconds: How long all would have taken; measured where all were trained, else extrapolated.
        checked_steps: After how many float64 steps the weights were compared.
        weight_difference: Largest difference of a weight after these.
        accuracy_differences: Of the final validation accuracies, ``[len(models)]``.
    """

    models: list[int]
    measured_seconds: float
    loop_seconds: float
    checked_steps: int
    weight_difference: float
    accuracy_differences: Tensor

    @property
    def weights_agree(self) -> bool:
        """Whether the weights agree within `WEIGHT_TOLERANCE`; NaN does not."""
        return self.weight_difference <= WEIGHT_TOLERANCE

    @property
    def accuracies_agree(self) -> bool:
        """Whether all final accuracies agree within `ACCURACY_TOLERANCE`."""
        return bool((self.accuracy_differences <= ACCURACY_TOLERANCE).all())


def compare_with_loop(
    task: Task,
    history: History,
    *,
    seconds: float,
    backend: str | None = None,
    on_model: Callable[[], None] = lambda: None,
) -> Comparison:
    """Train the models of a finished run once more, one after another, and compare.

    Args:
        task: What was trained.
        history: What was measured when all were trained at once.
        seconds: Stop training more models when the next one would end later than this. One is always trained.
        backend: As for `ModelBatch`.
        on_model: Called after each model.

    Returns:
        Times and differences.
    """
    accuracies: dict[int, Tensor] = {}
    # Scattered over the grid, so that a part of it stands for all.
    scattered = torch.randperm(task.num_models, generator=torch.Generator().manual_seed(0)).tolist()
    started = time.perf_counter()
    measured = 0.0
    for index in scattered:
        _, alone = train_alone(task, index)
        accuracies[index] = alone.validation_accuracy[-1][0]
        measured = time.perf_counter() - started
        on_model()
        if measured * (len(accuracies) + 1) / len(accuracies) > seconds:
            break
    models = sorted(accuracies)
    steps = min(CHECKED_STEPS, task.order.shape[0] * task.order.shape[1])
    return Comparison(
        models=models,
        measured_seconds=measured,
        loop_seconds=measured * task.num_models / len(models),
        checked_steps=steps,
        weight_difference=weight_difference(task, models, steps, backend),
        accuracy_differences=torch.stack(
            [(history.validation_accuracy[-1][i] - accuracies[i]).abs() for i in models]
        ),
    )


def weight_difference(task: Task, models: list[int], steps: int, backend: str | None = None) -> float:
    """Return the largest difference of a weight after some steps in float64, at once against one after another.

    Args:
        task: Where the models, their configurations and the batches come from.
        models: Which models to compare.
        steps: How many of the task's training steps to take.
        backend: As for `ModelBatch`.

    Returns:
        The largest absolute difference; NaN if any is.
    """
    short = replace(
        task,
        data=task.data.to(torch.float64),
        make_model=lambda: task.make_model().double(),
        configs=[task.configs[i] for i in models],
        seeds=[task.seeds[i] for i in models],
        order=task.order.flatten(0, 1)[:steps].unsqueeze(0),
    )
    at_once, _ = train_at_once(short, backend=backend)
    largest = torch.zeros((), dtype=torch.float64)
    for position, state in enumerate(at_once.get_model_states()):
        alone, _ = train_alone(short, position)
        for name, tensor in alone.state_dict().items():
            largest = torch.maximum(largest, (state[name] - tensor).abs().max())
    return largest.item()
