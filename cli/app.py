"""Commands and options of `modelbatch`, and how its errors are shown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import mb_torch
from cli.datasets import DataName
from cli.demo import Settings, run_demo
from cli.doctor import doctor as run_doctor
from cli.errors import CommandError
from cli.models import ModelName

# Typer's plain style: an error is one line below the usage, and bugs show Python's own traceback.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train many independent PyTorch models at once.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modelbatch-hybrid {mb_torch.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train many independent PyTorch models at once."""


@app.command()
def demo(
    data: Annotated[
        DataName, typer.Option(help="digits comes with scikit-learn; fashion-mnist is read from --data-dir.")
    ] = DataName.DIGITS,
    model: Annotated[ModelName, typer.Option(help="Which network.")] = ModelName.MLP,
    models: Annotated[int, typer.Option(min=1, max=4096, help="How many models: a grid, as square as possible.")] = 64,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 40 for digits, 3 for fashion-mnist.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Default: 64 for digits, 256 for fashion-mnist.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for plots, results and weights.")] = Path("demo_output"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of initial weights, data split and order of the batches.")
    ] = 0,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Use torch.compile (needs a C++ compiler).")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="Backend of ModelBatch. Default: $MODELBATCH_BACKEND, else torch.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    compare_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Then train the same models one after another, for about this long at most; the time of those "
            "left is extrapolated. 0 leaves it out.",
        ),
    ] = 60.0,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="MODELBATCH_DATA_DIR",
            help="Folder of the four Fashion-MNIST files. Default: where the Debian package puts them.",
        ),
    ] = None,
) -> None:
    """Train 64 models at once over a grid of learning rates and weight decays, on real images.

    Prints a table of the best models and compares with training them one after another. Writes validation curves and
    a heat map as PNG, results.json, and each model's weights.
    """
    settings = Settings(
        data=data,
        model=model,
        models=models,
        epochs=epochs if epochs is not None else data.default_epochs,
        batch_size=batch_size if batch_size is not None else data.default_batch_size,
        output=output,
        seed=seed,
        compile=compile,
        backend=backend,
        threads=threads,
        compare_seconds=compare_seconds,
        data_dir=data_dir,
    )
    try:
        if compile:
            _require_compiler()
        run_demo(settings, Console(highlight=False))
    except (CommandError, mb_torch.ModelBatchError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def _require_compiler() -> None:
    """torch.compile would say the same in a hundred lines, after the data has been read."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CommandError(
            f"--compile needs the C++ compiler {compiler!r}, which is not installed. "
            "Install one, name one in $CXX, or leave --compile out."
        )


@app.command()
def doctor() -> None:
    """Say which backend is the default, which work here, and whether their versions are those that were tested."""
    if not run_doctor():
        raise typer.Exit(1)
