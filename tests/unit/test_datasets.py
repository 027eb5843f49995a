"""The demo's data: scikit-learn's digits, and the reader of Fashion-MNIST's files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from cli.datasets import FASHION_MNIST_FOLDER, load_digit_images, load_fashion_mnist, read_idx
from cli.errors import CommandError


def idx_bytes(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes()


@pytest.fixture
def images() -> np.ndarray:
    return np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    """A folder of the right kind with 6 training and 3 test images."""
    generator = np.random.default_rng(0)
    for part, rows in (("train", 6), ("t10k", 3)):
        pixels = generator.integers(0, 256, (rows, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pixels)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.arange(rows))))
    return tmp_path


def test_digits_are_split_without_loss_or_overlap() -> None:
    data = load_digit_images(seed=0)
    rows = torch.cat([data.train_inputs, data.validation_inputs]).flatten(1)
    assert (len(data.train_inputs), len(data.validation_inputs)) == (1438, 359)
    assert len(rows.unique(dim=0)) == 1797
    assert data.train_inputs.shape[1:] == (1, 8, 8)
    assert data.train_inputs.dtype == torch.float32
    assert data.train_targets.dtype == torch.int64
    assert set(data.validation_targets.tolist()) == set(range(10))


def test_digits_are_standardised_by_the_training_images() -> None:
    data = load_digit_images(seed=0)
    assert data.train_inputs.mean().abs() < 1e-4
    assert (data.train_inputs.std() - 1).abs() < 1e-4
    assert data.validation_inputs.mean() != 0


def test_split_of_the_digits_follows_the_seed() -> None:
    first, again, other = (load_digit_images(seed) for seed in (1, 1, 2))
    assert first.validation_inputs.equal(again.validation_inputs)
    assert first.validation_targets.equal(again.validation_targets)
    assert not first.validation_targets.equal(other.validation_targets)


@pytest.mark.parametrize("name", ["images.gz", "images"])
def test_idx_file_is_read(tmp_path: Path, images: np.ndarray, name: str) -> None:
    content = idx_bytes(images)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    read = read_idx(tmp_path / name, 3)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, images)


def test_sizes_of_more_than_a_byte_are_big_endian(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(bytes((0, 0, 8, 1, 0, 0, 1, 2)) + bytes(258))
    assert read_idx(tmp_path / "labels", 1).shape == (258,)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "holds .* values, but has 23"),
        (lambda content: content + b"\0", "has 25"),
        (lambda content: content[:10], "no idx file"),
        (lambda content: b"", "no idx file"),
        (lambda content: b"\1" + content[1:], "starts with 01 00 08 03"),
        (lambda content: content[:2] + b"\x0d" + content[3:], "starts with 00 00 0d 03"),
        (lambda content: content[:3] + b"\2" + content[4:], "starts with 00 00 08 02"),
    ],
)
def test_damaged_idx_file_is_refused(tmp_path: Path, images: np.ndarray, damage, message: str) -> None:
    (tmp_path / "images").write_bytes(damage(idx_bytes(images)))
    with pytest.raises(CommandError, match=message) as caught:
        read_idx(tmp_path / "images", 3)
    assert "images" in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [lambda packed: packed[:-9], lambda packed: b"no gzip" + packed, lambda packed: packed[:12] + b"\xff" * 20],
)
def test_damaged_gzip_file_is_refused(tmp_path: Path, images: np.ndarray, damage) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(images))))
    with pytest.raises(CommandError, match=r"images\.gz cannot be read"):
        read_idx(path, 3)


def test_fashion_mnist_is_read_and_standardised(fashion_folder: Path) -> None:
    data = load_fashion_mnist(fashion_folder)
    raw = read_idx(fashion_folder / "t10k-images-idx3-ubyte.gz", 3).astype(np.float64)
    train = read_idx(fashion_folder / "train-images-idx3-ubyte.gz", 3).astype(np.float64)
    assert data.train_inputs.shape == (6, 1, 28, 28)
    assert data.train_targets.tolist() == list(range(6))
    assert data.validation_targets.tolist() == list(range(3))
    expected = (raw - train.mean()) / train.std(ddof=1)
    np.testing.assert_allclose(data.validation_inputs.squeeze(1).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_unpacked_files_will_do(fashion_folder: Path) -> None:
    for packed in fashion_folder.glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert len(load_fashion_mnist(fashion_folder).train_inputs) == 6


def test_missing_fashion_mnist_says_what_to_install(fashion_folder: Path) -> None:
    (fashion_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(CommandError, match="apt-get install dataset-fashion-mnist") as caught:
        load_fashion_mnist(fashion_folder)
    assert "t10k-labels-idx1-ubyte.gz" in str(caught.value)
    assert str(fashion_folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("train-labels-idx1", np.arange(5), "6 images.*5 labels"),
        ("train-labels-idx1", np.array([0, 1, 2, 3, 4, 10]), "label 10"),
        ("train-images-idx3", np.zeros((6, 28, 27)), r"\(28, 27\) pixels"),
    ],
)
def test_files_that_do_not_fit_are_refused(fashion_folder: Path, name: str, values: np.ndarray, message: str) -> None:
    (fashion_folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values)))
    with pytest.raises(CommandError, match=message):
        load_fashion_mnist(fashion_folder)


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_installed_fashion_mnist() -> None:
    data = load_fashion_mnist()
    assert data.train_inputs.shape == (60_000, 1, 28, 28)
    assert data.validation_inputs.shape == (10_000, 1, 28, 28)
    assert data.train_targets.bincount().tolist() == [6000] * 10
