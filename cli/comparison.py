"""Was it the same computation, and how much faster? The models of a finished run, trained one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from cli.training import History, Task, train_alone, train_at_once

# In float64 both ways must agree to this after so many steps. In float32 they cannot for long: sums are rounded in
# another order, and where training is unstable it doubles any difference again and again.
CHECKED_STEPS = 20
WEIGHT_TOLERANCE = 1e-9
# Of the final validation accuracy in float32, for models whose training is stable.
ACCURACY_TOLERANCE = 0.005
# At least so many models, if there are, have their weights compared, even if time allows to train less of them alone.
CHECKED_MODELS = 8
NUDGES = 4


@dataclass(frozen=True)
class Comparison:
    """Times and differences of the models that were also trained alone.

    Attributes:
        models: Which ones, rising.
        measured_seconds: How long these took, one after another.
        loop_seconds: How long all would have taken; measured where all were trained, else extrapolated.
        checked_models: How many models' weights were compared.
        checked_steps: After how many float64 steps.
        weight_difference: Largest difference of a weight after these.
        accuracy_differences: Of the final validation accuracies, ``[len(models)]``.
        rounding_effect: By how much the final accuracy of the model that differs most changes at most if it is
            trained alone `NUDGES` times more, from initial weights that are one rounding step away. The scale to judge
            its difference by; None where no accuracy differs by more than `ACCURACY_TOLERANCE`.
    """

    models: list[int]
    measured_seconds: float
    loop_seconds: float
    checked_models: int
    checked_steps: int
    weight_difference: float
    accuracy_differences: Tensor
    rounding_effect: float | None

    @property
    def weights_agree(self) -> bool:
        """Whether the float64 weights agree within `WEIGHT_TOLERANCE`; NaN does not."""
        return self.weight_difference <= WEIGHT_TOLERANCE

    @property
    def num_accuracies_agree(self) -> int:
        """How many models' final accuracies agree within `ACCURACY_TOLERANCE`."""
        return int((self.accuracy_differences <= ACCURACY_TOLERANCE).sum())

    @property
    def accuracies_agree(self) -> bool:
        """Whether at least half of them do; the unstable corner of the grid is smaller than that."""
        return 2 * self.num_accuracies_agree >= len(self.models)

    @property
    def most_different(self) -> int:
        """The model whose final accuracy differs most."""
        return self.models[int(self.accuracy_differences.argmax())]


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
        seconds: Stop when the next model would end later than this. One is always trained.
        backend: As for `ModelBatch`.
        on_model: Called after each model.

    Returns:
        Times and differences.
    """
    at_once = history.validation_accuracy[-1]
    alone = torch.full_like(at_once, torch.nan)
    measured, trained = 0.0, 0
    # Scattered over the grid, so that a part of it stands for all.
    scattered = torch.randperm(task.num_models, generator=torch.Generator().manual_seed(0)).tolist()
    for index in scattered:
        _, run = train_alone(task, index)
        alone[index] = run.validation_accuracy[-1].item()
        measured, trained = measured + run.total_seconds, trained + 1
        on_model()
        if measured * (trained + 1) / trained > seconds:
            break
    models = (~alone.isnan()).nonzero().flatten().tolist()
    differences = (alone - at_once).abs()[models]
    most_different = models[int(differences.argmax())]
    rounding_effect = None
    if differences.max() > ACCURACY_TOLERANCE:
        rounding_effect = 0.0
        for number in range(NUDGES):
            nudged = replace(task, make_model=partial(_nudged_model, task.make_model, number))
            _, run = train_alone(nudged, most_different)
            effect = abs(run.validation_accuracy[-1].item() - alone[most_different].item())
            rounding_effect = max(rounding_effect, effect)
    checked = scattered[: max(trained, CHECKED_MODELS)]
    steps = min(CHECKED_STEPS, task.order.shape[0] * task.order.shape[1])
    return Comparison(
        models=models,
        measured_seconds=measured,
        loop_seconds=measured * task.num_models / trained,
        checked_models=len(checked),
        checked_steps=steps,
        weight_difference=weight_difference(task, checked, steps, backend),
        accuracy_differences=differences,
        rounding_effect=rounding_effect,
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


@torch.no_grad()
def _nudged_model(make_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a model and move each weight to the next larger or smaller number of its dtype."""
    model = make_model()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        up = torch.rand(parameter.shape, generator=generator) < 0.5
        towards = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
        parameter.copy_(torch.nextafter(parameter, towards))
    return model
