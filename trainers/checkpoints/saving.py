"""Checkpoints of a run are written one after another, at once or in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from trainers.checkpoints.store import CheckpointStore
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
        self._running: _InBackground | None = None

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
            self._store.save(name, content, is_ranked=is_ranked, seconds=seconds, timeout_error=timeout_error)

        if not in_background:
            work()
            return
        self._running = _InBackground(work)
        self._running.start()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            TrainerError: A save in the background failed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.join()
            if running.failure is not None:
                raise running.failure

    def finish(self) -> bool:
        """Return when nothing is being written; what went wrong is only logged.

        For the end of a run: its last save, or the error that ends it, is not to be lost over an earlier failure.

        Returns:
            Whether the last save did not fail.
        """
        try:
            self.wait()
        except Exception:
            _LOGGER.exception("a save in the background failed; the last complete checkpoint is kept")
            return False
        return True

    def finish_within(self, seconds: float, timeout_error: Callable[[float], TrainerError]) -> bool:
        """Like `finish`, but wait for some time only.

        Args:
            seconds: How long.
            timeout_error: Makes the error for a save that takes longer; it is left to itself.

        Returns:
            Whether the last save did not fail.

        Raises:
            TrainerError: From ``timeout_error``.
        """
        if self._running is not None:
            self._running.join(seconds)
            if self._running.is_alive():
                # Who is to leave in time cannot wait for it at the end of the run either.
                self._running = None
                raise timeout_error(seconds)
        return self.finish()


class _InBackground(threading.Thread):
    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="save")
        self.failure: BaseException | None = None
        self._work = work

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failure = error
