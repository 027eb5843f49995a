"""Train 16 small classifiers with 16 learning rates at once, by the documented loop and by the fused step.

Run it with ``python examples/simple_demo.py``.
"""

import torch
from torch import nn

from mb_torch import ModelBatch, OptimizerFactory, create_adam_configs, create_lr_sweep_configs

NUM_MODELS = 16


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))


def make_data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in a square, labelled by whether they lie within a ring."""
    points = torch.rand(rows, 2) * 4 - 2
    radius = points.norm(dim=1)
    return points, ((radius > 0.7) & (radius < 1.6)).long()


def make_batch() -> tuple[ModelBatch, torch.optim.Optimizer]:
    mb = ModelBatch.from_factory(make_model, seeds=range(NUM_MODELS))
    rates = [config["lr"] for config in create_lr_sweep_configs(1e-4, 1e-1, NUM_MODELS)]
    optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(mb, create_adam_configs(rates))
    return mb, optimizer


def train_by_the_documented_loop(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> ModelBatch:
    mb, optimizer = make_batch()
    for inputs, labels in batches:
        optimizer.zero_grad()
        outputs = mb(inputs)  # [num_models, batch, 2]
        # "sum" trains every model as if alone; the default "mean" divides its gradient by num_models.
        loss = mb.compute_loss(outputs, labels, nn.functional.cross_entropy, reduction="sum")
        loss.backward()
        optimizer.step()
    return mb


def train_by_the_fused_step(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> ModelBatch:
    mb, optimizer = make_batch()
    step = mb.make_train_step(nn.functional.cross_entropy, optimizer)
    for inputs, labels in batches:
        step(inputs, labels)  # forward, loss, backward and update of all models
    return mb


def main() -> None:
    torch.manual_seed(0)
    batches = [make_data(128) for _ in range(300)]
    documented, fused = train_by_the_documented_loop(batches), train_by_the_fused_step(batches)

    inputs, labels = make_data(2000)
    with torch.no_grad():
        right = (fused(inputs).argmax(-1) == labels).float().mean(1)  # [num_models]
        difference = (documented(inputs) - fused(inputs)).abs().max()
    best = int(right.argmax())
    print(f"best of {NUM_MODELS}: model {best} with {right[best]:.1%}, worst {right.min():.1%}")
    print(f"loop and fused step agree up to {difference:.1e}")

    plain = fused.model(best)  # an nn.Module like any other, with its own copy of the weights
    with torch.no_grad():
        alone = (plain(inputs).argmax(-1) == labels).float().mean()
    print(f"the best model, taken out of the batch: {alone:.1%}")


if __name__ == "__main__":
    main()
