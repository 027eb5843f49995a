"""Grid searches that would start themselves again in each of their experiments, without end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.config.errors import ConfigurationError

# Tells a training script by which scripts it was started, itself included.
_VARIABLE = "TRAINERS_GRID_SEARCH_SCRIPTS"

_imported: list[str] = []


@contextmanager
def importing_build(path: str) -> Iterator[None]:
    """Refuse grid searches for as long as the context lasts.

    Args:
        path: ``"module:function"`` that is imported.
    """
    _imported.append(path)
    try:
        yield
    finally:
        _imported.pop()


def refuse_while_importing() -> None:
    """Raise if this process is importing a function that builds experiments.

    Raises:
        ConfigurationError: It is; a grid search now would import it again, in a process of its own.

    Example:
        >>> refuse_while_importing()
    """
    if _imported:
        raise ConfigurationError(
            f"run_grid_search: received a call while {_imported[-1]!r} is imported for its experiments, each of which "
            "would start the search anew; expected a module that only defines. Put the call below "
            '`if __name__ == "__main__":`'
        )


def refuse_own_script(script: Path) -> None:
    """Raise if this process runs, directly or not, for an experiment of the same script.

    Args:
        script: That the grid search is to run.

    Raises:
        ConfigurationError: It does.

    Example:
        >>> refuse_own_script(Path("scripts/train.py"))
    """
    if str(script.resolve()) in _scripts():
        raise ConfigurationError(
            f"script_path: received {script}, whose experiments start this grid search anew, each of them; expected a "
            "script that trains one experiment. Start the grid search from another file"
        )


def environment_for(script: Path) -> dict[str, str]:
    """Return the environment of an experiment's process.

    Args:
        script: That it runs.

    Returns:
        That of this process, and by which scripts the experiment was started.

    Example:
        >>> environment_for(Path("/scripts/train.py"))["TRAINERS_GRID_SEARCH_SCRIPTS"]
        '/scripts/train.py'
    """
    return {**os.environ, _VARIABLE: os.pathsep.join([*_scripts(), str(script.resolve())])}


def _scripts() -> list[str]:
    given = os.environ.get(_VARIABLE)
    return given.split(os.pathsep) if given else []
