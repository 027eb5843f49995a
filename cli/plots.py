"""The demo's two pictures. They use Figure objects, so that no display and no global state is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from cli.grid import Grid
from cli.report import rank, short
from cli.training import History

HIGHLIGHT = "#d62728"
# Without the last, yellow part, which is hard to see on white.
LINE_COLOURS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))
# The axis of the curves stretches towards 100 %, where the good models are, and ends there at a finite height.
ACCURACY_TICKS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 1.0)
ACCURACY_OFFSET = 0.005
# Bad models are many and far from the good ones, which deserve the room.
LOWEST_SHOWN_QUANTILE = 0.1


def plot_curves(path: Path, title: str, grid: Grid, history: History) -> None:
    """Write validation accuracy over epochs as PNG: one line a model, coloured by learning rate, the best in front.

    Args:
        path: The file.
        title: Above the plot.
        grid: Hyper-parameters of the models.
        history: What was measured after each epoch.
    """
    accuracy = torch.stack(history.validation_accuracy, 1).numpy()
    epochs = np.arange(1, accuracy.shape[1] + 1)
    best, configs = rank(history)[0], grid.configs
    norm, colours = LogNorm(grid.learning_rates[0] / 1.5, grid.learning_rates[-1] * 1.5), LINE_COLOURS
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(epochs) == 1 else None
    for index, curve in enumerate(accuracy):
        axes.plot(epochs, curve, color=colours(norm(configs[index]["lr"])), linewidth=1, alpha=0.55, marker=marker)
    label = (
        f"best: model {best}, {accuracy[best, -1]:.1%}\n"
        f"learning rate {short(configs[best]['lr'])}, weight decay {short(configs[best]['weight_decay'])}"
    )
    axes.plot(epochs, accuracy[best], color=HIGHLIGHT, linewidth=2.5, label=label, marker=marker)
    axes.set(title=title, xlabel="epoch", ylabel="validation accuracy (scale stretched towards 100 %)")
    axes.set_xlim(*((epochs[0], epochs[-1]) if len(epochs) > 1 else (0.5, 1.5)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("function", functions=(_stretch, _unstretch))
    low, high = max(0.0, accuracy.min() - 0.05), min(1.0, accuracy.max() + 0.003)
    axes.yaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(low, high)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02)
    bar.set_label("learning rate")
    bar.ax.yaxis.set_major_locator(FixedLocator(grid.learning_rates))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    figure.savefig(path, dpi=150)


def plot_heat_map(path: Path, title: str, grid: Grid, history: History) -> None:
    """Write the final validation accuracy over learning rate and weight decay as PNG, the best cell framed.

    Args:
        path: The file.
        title: Above the plot.
        grid: Hyper-parameters of the models.
        history: What was measured after each epoch.
    """
    rows, columns = len(grid.weight_decays), len(grid.learning_rates)
    accuracy = history.validation_accuracy[-1].numpy()
    cells = accuracy.reshape(columns, rows).T
    low, high = np.quantile(accuracy, LOWEST_SHOWN_QUANTILE), accuracy.max()
    norm, colours = Normalize(low, max(high, low + 1e-3)), colormaps["viridis"]
    figure = Figure(figsize=(max(6.0, 2.6 + 0.8 * columns), max(3.5, 1.8 + 0.55 * rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, norm=norm, cmap=colours, origin="lower", aspect="auto")
    # Numbers in cells of more than a few hundred models would not be legible.
    if columns <= 16:
        for (row, column), value in np.ndenumerate(cells):
            dark = norm(value) < 0.6
            axes.text(
                column, row, f"{value:.1%}", ha="center", va="center", fontsize=9, color="white" if dark else "black"
            )
    best_column, best_row = divmod(rank(history)[0], rows)
    axes.add_patch(
        Rectangle(
            (best_column - 0.5, best_row - 0.5), 1, 1, fill=False, edgecolor=HIGHLIGHT, linewidth=3, clip_on=False
        )
    )
    axes.set(title=title, xlabel="learning rate", ylabel="weight decay")
    axes.set_xticks(range(columns), [short(rate) for rate in grid.learning_rates])
    axes.set_yticks(range(rows), [short(decay) for decay in grid.weight_decays])
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend="min" if accuracy.min() < low else "neither")
    bar.set_label("validation accuracy")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path, dpi=150)


def _ticks(low: float, high: float) -> list[float]:
    """Accuracies to label between two: the fixed ones, or where few of them fit, evenly spaced whole percents."""
    fitting = [tick for tick in ACCURACY_TICKS if low <= tick <= high]
    if len(fitting) >= 4:
        return fitting
    return [tick for tick in MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]


def _stretch(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    # Clipped, because matplotlib also asks about values outside the axis.
    return -np.log(1 + ACCURACY_OFFSET - np.clip(accuracy, 0, 1))


def _unstretch(height: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 + ACCURACY_OFFSET - np.exp(-height)
