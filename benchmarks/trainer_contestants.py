"""`GenericTrainer` as a contestant: a `fit` of one epoch for the batches of each call."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from benchmarks.contestants import Contestant, cross_entropy
from benchmarks.workloads import Batch, Workload
from mb_torch import ModelBatch, OptimizerFactory
from trainers.config import CheckpointConfig, LoggingConfig
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig


class _Trainer(GenericTrainer):
    """Keeps the losses of each step, as the loops by hand do."""

    def __init__(self, config: GenericTrainerConfig) -> None:
        super().__init__(config, loss_fn=cross_entropy)
        self.kept: list[Any] = []

    def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
        self.kept.append(logs["loss"])


class _Trained(Contestant):
    """Makes the steps of a loop written by hand: nothing is clipped or saved, and no progress is shown."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        folder = tempfile.TemporaryDirectory()
        weakref.finalize(self, folder.cleanup)
        self.trainer = _Trainer(
            GenericTrainerConfig(
                checkpoint=CheckpointConfig(checkpoint_dir=folder.name, save_every_n_epochs=None, save_last=False),
                max_epochs=1,
                max_grad_norm=None,
                logging=LoggingConfig(console_log=False, log_level="WARNING"),
            )
        )

    def step(self, inputs: Tensor, targets: Tensor) -> Any:
        return self.run([(inputs, targets)])[0]

    def run(self, batches: Sequence[Batch]) -> Any:
        self.trainer.fit(self.model, self.optimizer, batches)
        losses, self.trainer.kept = self.trainer.kept, []
        return losses


class TrainedModule(_Trained):
    """A single module and PyTorch's optimizer."""

    def __init__(self, workload: Workload) -> None:
        (model,), (rate,) = workload.models(), workload.learning_rates
        recipe = workload.recipe
        super().__init__(model, recipe.optimizer(model.parameters(), lr=rate, **recipe.options))

    def losses(self, returned: Any) -> Any:
        return super().losses([loss.reshape(1) for loss in returned])

    def states(self) -> Sequence[Mapping[str, Tensor]]:
        return [self.model.state_dict()]


class TrainedBatch(_Trained):
    """A `ModelBatch`, which the trainer trains through its fused step."""

    def __init__(self, workload: Workload) -> None:
        recipe = workload.recipe
        self.batch = ModelBatch(workload.models(), shared_input=workload.shared_input)
        configs = [{"lr": rate, **recipe.options} for rate in workload.learning_rates]
        super().__init__(self.batch, OptimizerFactory(recipe.optimizer).create_optimizer(self.batch, configs))

    def states(self) -> Sequence[Mapping[str, Tensor]]:
        return self.batch.get_model_states()
