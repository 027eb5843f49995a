"""The demo: load real data, train a grid of models at once, report, and compare with one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from cli.comparison import Comparison, compare_with_loop
from cli.datasets import DataName, ImageData, load_data
from cli.errors import CommandError
from cli.grid import Grid, make_grid
from cli.models import ModelName, make_model
from cli.plots import plot_curves, plot_heat_map
from cli.report import counted, print_best, print_comparison, print_line, rank, stage, write_results
from cli.training import History, Task, make_order, train_at_once
from mb_torch import ModelBatch


@dataclass(frozen=True)
class Settings:
    """The options of ``modelbatch demo``; see its ``--help``."""

    data: DataName
    model: ModelName
    models: int
    epochs: int
    batch_size: int
    output: Path
    seed: int
    compile: bool
    backend: str | None
    threads: int | None
    compare_seconds: float
    data_dir: Path | None


def run_demo(settings: Settings, console: Console) -> None:
    """Run the demo.

    Args:
        settings: What to run.
        console: Where to print.

    Raises:
        CommandError: The data or the output folder cannot be used, or the settings do not fit together.
        mb_torch.ModelBatchError: The chosen backend cannot do it.
    """
    _prepare_output(settings.output)
    backend = _backend_name(settings.backend)
    data = load_data(settings.data, settings.seed, settings.data_dir)
    grid = make_grid(settings.models)
    task = Task(
        data=data,
        make_model=partial(make_model, settings.model, data.image_size, data.num_classes),
        configs=grid.configs,
        seeds=range(settings.seed, settings.seed + grid.num_models),
        order=make_order(len(data.train_targets), settings.batch_size, settings.epochs, settings.seed),
    )
    with _threads(settings.threads):
        print_line(console, _describe(settings, grid, task, backend))
        mb, history = _train(settings, task, console)
        print_best(console, grid, history)
        _write_models(settings, grid, mb, history)
        comparison = None
        if settings.compare_seconds > 0:
            comparison = _compare(settings, task, history, console)
            print_comparison(console, grid, history, comparison, compiled=settings.compile)
    with _writing(settings.output):
        options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
        options |= {"models": grid.num_models, "backend": backend}
        inputs = {"mean": data.mean, "deviation": data.deviation}
        write_results(settings.output / "results.json", options, inputs, grid, task.seeds, history, comparison)
    print_line(console, _describe_output(settings, data, rank(history)[0]))


def _backend_name(backend: str | None) -> str:
    """Find out before anything is loaded or announced which backend it is, and that it is installed."""
    return ModelBatch([nn.Linear(1, 1)], backend=backend).backend.name


def _describe(settings: Settings, grid: Grid, task: Task, backend: str) -> str:
    epochs, steps, batch_size = task.order.shape
    parts = [
        f"{counted(grid.num_models, 'model')} ({settings.model}): {counted(len(grid.learning_rates), 'learning rate')} "
        f"x {counted(len(grid.weight_decays), 'weight decay')}, AdamW, {counted(epochs, 'epoch')} of "
        f"{steps} x {batch_size} images, {counted(torch.get_num_threads(), 'thread')}, backend {backend}.",
        f"Data: {settings.data}, {len(task.data.train_targets):,} images for training and "
        f"{len(task.data.validation_targets):,} for validation.",
    ]
    if grid.num_models != settings.models:
        parts.insert(0, f"{settings.models} models make no near-square grid; running {grid.num_models}.")
    return "\n".join(parts)


def _train(settings: Settings, task: Task, console: Console) -> tuple[ModelBatch, History]:
    epochs, steps, _ = task.order.shape
    with stage(console, f"Training {counted(task.num_models, 'model')} at once", epochs * steps, "steps") as progress:

        def on_epoch(history: History) -> None:
            best = history.validation_accuracy[-1].max()
            progress.say(f"epoch {len(history.seconds)}/{epochs}, its best validation accuracy {best:.2%}")

        return train_at_once(
            task,
            backend=settings.backend,
            compiled=settings.compile,
            on_step=progress.advance,
            on_epoch=on_epoch,
        )


def _compare(settings: Settings, task: Task, history: History, console: Console) -> Comparison:
    title = "Training the same models one after another in plain PyTorch"
    with stage(console, title, task.num_models, "models") as progress:
        return compare_with_loop(
            task,
            history,
            seconds=settings.compare_seconds,
            backend=settings.backend,
            on_model=progress.advance,
        )


def _prepare_output(folder: Path) -> None:
    """Find out before the training, not after it, that nothing can be written."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _write_models(settings: Settings, grid: Grid, mb: ModelBatch, history: History) -> None:
    folder, weights = settings.output, settings.output / "weights"
    title = f"{grid.num_models} {settings.model.upper()}{'s' if grid.num_models > 1 else ''} on {settings.data}"
    with _writing(folder):
        # Until the end of this run, and after an interruption, there is no report of other weights beside these.
        (folder / "results.json").unlink(missing_ok=True)
        mb.save_all(weights)
        # What an earlier run with more models left would pass for results of this one.
        for path in weights.glob("model_*.pt"):
            number = path.stem.removeprefix("model_")
            if number.isdecimal() and int(number) >= grid.num_models:
                path.unlink()
        plot_curves(folder / "validation_curves.png", f"{title}: validation accuracy", grid, history)
        plot_heat_map(folder / "heat_map.png", f"{title}: validation accuracy after training", grid, history)


def _describe_output(settings: Settings, data: ImageData, best: int) -> str:
    folder, weights = settings.output, settings.output / "weights"
    shape = f"{settings.model.value!r}, {data.image_size}, {data.num_classes}"
    return (
        f"Written to {folder}: validation_curves.png, heat_map.png, results.json, weights/model_<i>.pt\n"
        "To load the best model, in Python:\n"
        "    import torch; from cli.models import make_model\n"
        f"    model = make_model({shape})\n"
        f"    model.load_state_dict(torch.load({str(weights / f'model_{best}.pt')!r}, weights_only=True))\n"
        f"    scores = model((images - {data.mean:.6g}) / {data.deviation:.6g})"
        f"  # images: float pixels [rows, 1, {data.image_size}, {data.image_size}]\n"
        f"and all of them, into a ModelBatch of as many such models: mb.load_all({str(weights)!r})"
    )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror or error}") from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
