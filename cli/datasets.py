"""The demo's data: scikit-learn's digits, and Fashion-MNIST from files on disk. Nothing is downloaded."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from cli.errors import CommandError

# Where the Debian package dataset-fashion-mnist puts its files.
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_SIZE = 28
NUM_CLASSES = 10
VALIDATION_PART = 0.2
# The idx format says "unsigned byte" with this number, the only type that the MNIST family uses.
IDX_UNSIGNED_BYTE = 8


class DataName(StrEnum):
    """What ``--data`` accepts."""

    DIGITS = "digits"
    FASHION_MNIST = "fashion-mnist"

    @property
    def default_epochs(self) -> int:
        """Enough to tell good models from bad ones within a minute or two."""
        return 40 if self is DataName.DIGITS else 3

    @property
    def default_batch_size(self) -> int:
        """Rows of a training batch."""
        return 64 if self is DataName.DIGITS else 256


@dataclass(frozen=True)
class ImageData:
    """Labelled square grey images, standardised with the mean and deviation of the training pixels.

    Attributes:
        train_inputs: ``[rows, 1, size, size]`` float32.
        train_targets: ``[rows]`` class numbers.
        validation_inputs: ``[validation_rows, 1, size, size]`` float32.
        validation_targets: ``[validation_rows]`` class numbers.
        num_classes: How many classes there are.
        mean: What was subtracted from the pixels.
        deviation: What they were then divided by.
    """

    train_inputs: Tensor
    train_targets: Tensor
    validation_inputs: Tensor
    validation_targets: Tensor
    num_classes: int
    mean: float
    deviation: float

    @property
    def image_size(self) -> int:
        """Height and width of an image."""
        return self.train_inputs.shape[-1]

    def to(self, dtype: torch.dtype) -> ImageData:
        """Return the same data with inputs of another dtype."""
        return replace(
            self, train_inputs=self.train_inputs.to(dtype), validation_inputs=self.validation_inputs.to(dtype)
        )


def load_data(name: DataName, seed: int, folder: Path | None = None) -> ImageData:
    """Return the named data set.

    Args:
        name: Which one.
        seed: Of the split of the digits; Fashion-MNIST comes with one.
        folder: Where the files of Fashion-MNIST are. Default: where the Debian package puts them.

    Raises:
        CommandError: The files are missing or damaged.
    """
    return load_digit_images(seed) if name is DataName.DIGITS else load_fashion_mnist(folder)


def load_digit_images(seed: int) -> ImageData:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a fifth of them for validation."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(digits.images).float().unsqueeze(1)[order]
    labels = torch.from_numpy(digits.target).long()[order]
    split = round(len(labels) * (1 - VALIDATION_PART))
    return _standardised(images[:split], labels[:split], images[split:], labels[split:])


def load_fashion_mnist(folder: Path | None = None) -> ImageData:
    """Return Fashion-MNIST: 60,000 training images of 28 x 28 pixels, and its 10,000 test images for validation.

    Args:
        folder: Holds the four files of the original distribution, gzipped or not. Default: the Debian package's.

    Raises:
        CommandError: A file is missing or damaged; says what to install.
    """
    folder = FASHION_MNIST_FOLDER if folder is None else folder
    parts = [_read_images_and_labels(folder, part) for part in ("train", "t10k")]
    return _standardised(*parts[0], *parts[1])


def _read_images_and_labels(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_file, labels_file = (_find_file(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels) or not len(images):
        raise CommandError(
            f"{images_file} holds {len(images)} images, but {labels_file} {len(labels)} labels; "
            "as many labels as images are needed, and at least one"
        )
    if images.shape[1:] != (FASHION_MNIST_SIZE, FASHION_MNIST_SIZE):
        raise CommandError(f"{images_file} holds images of {images.shape[1:]} pixels; expected (28, 28)")
    if labels.max() >= NUM_CLASSES:
        raise CommandError(f"{labels_file} holds the label {labels.max()}; expected 0 to {NUM_CLASSES - 1}")
    return torch.from_numpy(images).float().unsqueeze(1), torch.from_numpy(labels).long()


def _find_file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise CommandError(
        f"Fashion-MNIST was not found: there is no {name}.gz in {folder}. On Debian and Ubuntu install it with "
        "`apt-get install dataset-fashion-mnist`; elsewhere get its four files and pass their folder with --data-dir."
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an array of bytes in the idx format of the MNIST family.

    The format: two zero bytes, a byte for the type, a byte for the number of dimensions, the size of each dimension
    as a big-endian 32-bit integer, then the values in row-major order (http://yann.lecun.com/exdb/mnist/).

    Args:
        path: The file; gzipped if its name ends in ``.gz``.
        dimensions: How many dimensions it must have.

    Raises:
        CommandError: The file cannot be read, is truncated, too long, or not of this kind.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{path} cannot be read: {error}") from error
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, IDX_UNSIGNED_BYTE, dimensions))
    if content[:4] != magic or len(content) < header:
        raise CommandError(
            f"{path} is no idx file of bytes in {dimensions} dimension(s): it starts with {content[:4].hex(' ')}; "
            f"expected {magic.hex(' ')} and {4 * dimensions} bytes of sizes"
        )
    shape = tuple(np.frombuffer(content, ">u4", count=dimensions, offset=4).tolist())
    values = np.frombuffer(content, np.uint8, offset=header)
    if values.size != np.prod(shape, dtype=np.int64):
        raise CommandError(f"{path} says it holds {shape} values, but has {values.size}: is it truncated?")
    # A copy, because torch wants memory that it may write to.
    return values.reshape(shape).copy()


def _standardised(
    train_images: Tensor, train_labels: Tensor, validation_images: Tensor, validation_labels: Tensor
) -> ImageData:
    """One mean and deviation for all pixels: some pixels of the digits are never inked, and have no deviation."""
    mean, deviation = train_images.mean(), train_images.std()
    return ImageData(
        (train_images - mean) / deviation,
        train_labels,
        (validation_images - mean) / deviation,
        validation_labels,
        NUM_CLASSES,
        mean.item(),
        deviation.item(),
    )
