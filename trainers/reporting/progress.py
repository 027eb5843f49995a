"""A progress bar with rate and remaining time; quiet where nobody looks at it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm


class Progress:
    """The bar of one epoch.

    Args:
        title: In front of the bar.
        total: Batches of the epoch; None if unknown.
        done: Batches before a resume.
        is_wanted: False shows nothing. Nothing is shown either where stderr is neither a terminal nor a notebook.

    Example:
        >>> with Progress("epoch 0", total=2) as progress:
        ...     progress.advance({"loss": 0.5})
    """

    def __init__(self, title: str, total: int | None = None, done: int = 0, is_wanted: bool = True) -> None:
        is_hidden = not is_wanted or not (sys.stderr.isatty() or _is_notebook())
        self._bar = tqdm(desc=title, total=total, initial=done, unit="batch", leave=False, disable=is_hidden)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    @property
    def is_shown(self) -> bool:
        """Whether anybody can see the bar."""
        return not self._bar.disable

    def advance(self, values: Mapping[str, Any]) -> None:
        """Count one batch.

        Args:
            values: Shown behind the bar, numbers only.
        """
        if not self.is_shown:
            return
        shown = {key: f"{value:.4g}" for key, value in values.items() if isinstance(value, (int, float))}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()


def _is_notebook() -> bool:
    """Whether this process is the kernel of a notebook: somebody looks at it, though its stderr is no terminal."""
    # Only where it runs already: to ask it must not import it.
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
