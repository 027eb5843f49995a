"""Checkpoints of a run are written one after another, at once or in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from trainers.checkpoint import CheckpointStore
from trainers.errors import TrainerError

_LOGGER = logging.getLogger(__name__)


class Saves:
    """Writes checkpoints one after another.

    In the background, training goes on while a copy of the state is written: that is one more copy of models and
    optimizer state in memory, on the host. What went wrong is raised at the next save, and at the end of the run.

    Args:
        store: Where they go.

    Example:
        >>> from pathlib import Path
        >>> Saves(CheckpointStore(Path("runs"))).wait()
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        name: str,
        content: dict[str, Any],
        *,
        is_ranked: bool,
        seconds: float,
        timeout_error: Callable[[float], TrainerError],
        in_background: bool,
    ) -> None:
        """Write a checkpoint, after those that were begun before.

        Args:
            name: Of the file.
            content: See `CheckpointStore.save`.
            is_ranked: See there.
            seconds: How long it may take.
            timeout_error: Makes the error for a save that takes longer.
            in_background: Whether to return before it is written.

        Raises:
            TrainerError: This save fails, or one in the background has.
        """
        self.wait()
        if in_background:
            # The run changes its tensors while they are written.
            content = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, content)

        def work() -> None:
            self._store.save(
                name,
                content,
                is_ranked=is_ranked,
                deadline=time.monotonic() + seconds,
                timeout_error=lambda: timeout_error(seconds),
            )

        if not in_background:
            work()
            return
        self._thread = threading.Thread(target=self._run, args=(work,), name="save")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            TrainerError: A save in the background failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def finish(self) -> None:
        """Return when nothing is being written; what went wrong is only logged.

        For the end of a run: its last save, or the error that ends it, is not to be lost over an earlier failure.
        """
        try:
            self.wait()
        except Exception:
            _LOGGER.exception("a save in the background failed; the last complete checkpoint is kept")

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failure = error
