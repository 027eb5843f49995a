"""The networks of the demo. Nothing in them knows that they will be trained many at a time."""

from __future__ import annotations

from enum import StrEnum

from torch import nn


class ModelName(StrEnum):
    """What ``--model`` accepts."""

    MLP = "mlp"
    CNN = "cnn"


def make_model(name: ModelName | str, image_size: int, num_classes: int) -> nn.Sequential:
    """Return a fresh network for square grey images.

    Args:
        name: ``mlp``: one hidden layer of 128. ``cnn``: two 3x3 convolutions of stride 2.
        image_size: Height and width of the images ``[batch, 1, image_size, image_size]``.
        num_classes: How many scores per image.

    Example:
        >>> import torch
        >>> make_model(ModelName.CNN, 8, 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if ModelName(name) is ModelName.MLP:
        return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, 128), nn.ReLU(), nn.Linear(128, num_classes))
    # Each convolution halves the image and rounds up.
    final_size = -(-image_size // 4)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * final_size**2, num_classes),
    )
