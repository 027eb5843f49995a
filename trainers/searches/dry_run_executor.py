"""Runs nothing: writes the commands and job scripts that a run would use."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Generator
from pathlib import Path

from trainers.config.files import write_atomically
from trainers.searches.executors import Outcome, Plan, write_job_scripts

_LOGGER = logging.getLogger(__name__)

COMMANDS_FILE = "commands.txt"
JOB_ID = "DRY_RUN"


class DryRunExecutor:
    """Writes ``commands.txt``, a shell command a line, and job scripts where the package that makes them is installed.

    Example:
        >>> DryRunExecutor().settled([Path("experiments/a")])
        set()
    """

    def check(self, plan: Plan) -> None:
        """Warn if the script is missing: a run would refuse that."""
        if plan.build is None and not plan.script_path.is_file():
            _LOGGER.warning("the script %s does not exist; a run would refuse that", plan.script_path)

    def run(self, plan: Plan) -> Generator[Outcome]:
        """Write the commands, and say of each experiment that it was a dry run."""
        commands = "".join(f"{shlex.join(task.command)}\n" for task in plan.tasks())
        write_atomically(plan.output_dir / COMMANDS_FILE, commands)
        for name in write_job_scripts(plan):
            _LOGGER.info("no %s job scripts were written: its executor is not installed", name)
        for job in plan.jobs:
            yield Outcome(job, job_id=JOB_ID)

    def settled(self, folders: Collection[Path]) -> set[Path]:
        """A dry run completes nothing."""
        return set()
