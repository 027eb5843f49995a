"""What an executor must provide, and how one is found by name.

An executor brings the experiments of a grid search to where they run. This file imports none of them: each is loaded
from its registered path when its execution mode is used.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainers.config.errors import ConfigurationError
from trainers.searches.packing import PACK_FILE, PACKS_FOLDER, pack, pack_command, pack_name

if TYPE_CHECKING:
    from trainers.config.schema import ExperimentConfig

_EXECUTORS: dict[str, str] = {
    "dry_run": "trainers.searches.dry_run_executor:DryRunExecutor",
    "local": "trainers.searches.local_executor:LocalExecutor",
    "slurm": "slurm.executor:SlurmExecutor",
}
# Callables `(project_root, template_path) -> launcher`.
_LAUNCHERS = {"slurm": "slurm.executor:create_launcher"}
# Callables `(plan)` that write the job scripts which a run would submit.
_SCRIPT_WRITERS = {"slurm": "slurm.executor:write_job_scripts"}
# Extras of this distribution that bring what an executor needs.
_EXTRAS = {"slurm": "slurm"}

RECORD_FILE = "job.json"
# With which a script says that its run was saved but is not complete: that of `sysexits.h` for "try again later".
INTERRUPTED_EXIT_CODE = 75
CONFIG_FILE = "config.yaml"


class MissingExecutor(ConfigurationError, ImportError):
    """An executor, or a package that it needs, is not installed."""


class MissingScript(ConfigurationError, FileNotFoundError):
    """The training script does not exist."""


@dataclass(frozen=True)
class Job:
    """One experiment to be run.

    Attributes:
        index: Its number in the grid search, from 0.
        name: Its name.
        config: Its configuration.
        folder: Its folder, absolute; `config_path` in it has been written.
    """

    index: int
    name: str
    config: ExperimentConfig
    folder: Path

    @property
    def config_path(self) -> Path:
        """The file with its complete configuration."""
        return self.folder / CONFIG_FILE

    @property
    def record_path(self) -> Path:
        """The file that says what became of it."""
        return self.folder / RECORD_FILE

    def config_hash(self) -> str:
        """SHA-256 of the configuration file."""
        return hashlib.sha256(self.config_path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Task:
    """What one process runs.

    Attributes:
        jobs: Its experiments: one for a script, several for a pack.
        command: That runs them, in the project's folder.
        folder: For its output.
        output_name: Of the files with its output, without suffix.
        is_pack: Whether the process itself says what became of each of its experiments, see `packing`.
    """

    jobs: tuple[Job, ...]
    command: list[str]
    folder: Path
    output_name: str
    is_pack: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything an executor is told.

    Attributes:
        jobs: The experiments, in order.
        script_path: The training script, absolute.
        project_root: The project's folder, absolute; working directory of the experiments.
        output_dir: Folder of the grid search, absolute.
        max_concurrent_jobs: How many experiments, or packs of them, may run at once; None leaves it to the executor.
        template_path: Template of job scripts, where the user named one.
        lock: File descriptor that holds `output_dir`; child processes inherit it, so that it is held while they live.
        build: ``"module:function"`` that builds experiments, which are then trained in packs; None for a script each.
        pack_size: How many experiments a pack may have; None for the default.
        backend: Of the batches; None for the default, ``"auto"`` to try which is the fastest.
    """

    jobs: tuple[Job, ...]
    script_path: Path
    project_root: Path
    output_dir: Path
    max_concurrent_jobs: int | None = None
    template_path: Path | None = None
    lock: int | None = None
    build: str | None = None
    pack_size: int | None = None
    backend: str | None = None

    def tasks(self) -> list[Task]:
        """What is to be started: a script for each experiment, or a process for each pack of built experiments."""
        if self.build is None:
            return [Task((job,), self._command(job), job.folder, f"local-{job.index}") for job in self.jobs]
        packs = pack([job.config for job in self.jobs], self.pack_size)
        return [self.pack_task([self.jobs[place] for place in places]) for places in packs]

    def pack_task(self, jobs: Sequence[Job]) -> Task:
        """The process that trains built experiments together.

        Args:
            jobs: The experiments, of one batch.
        """
        assert self.build is not None
        folder = self.output_dir / PACKS_FOLDER / pack_name(self.build, [job.name for job in jobs])
        return Task(tuple(jobs), pack_command(str(folder)), folder, "local", is_pack=True)

    def pack_contents(self) -> dict[Path, dict[str, Any]]:
        """What has to be written for the packs to run: contents of files."""
        return dict(map(self.pack_content, self.tasks())) if self.build is not None else {}

    def pack_content(self, task: Task) -> tuple[Path, dict[str, Any]]:
        """What has to be written for one pack to run: the file, and its content.

        Args:
            task: From `pack_task`.
        """
        asked = {"build": self.build, "backend": self.backend, "experiments": [job.name for job in task.jobs]}
        return task.folder / PACK_FILE, asked

    def _command(self, job: Job) -> list[str]:
        options = {"--config": job.config_path, "--experiment-name": job.name, "--output-dir": job.folder}
        pairs = [text for option, value in options.items() for text in (option, str(value))]
        return [sys.executable, str(self.script_path), *pairs]


@dataclass(frozen=True)
class Outcome:
    """What became of one experiment.

    Attributes:
        job: The experiment.
        job_id: Its job id if it was submitted or, run on the spot, succeeded; else None.
        error: What went wrong; None if nothing did.
        cause: The same for all experiments that one thing went wrong with: the error without files of their own.
    """

    job: Job
    job_id: str | None = None
    error: str | None = None
    cause: str | None = None


class Executor(Protocol):
    """Runs or submits experiments. Made without arguments."""

    def check(self, plan: Plan) -> None:
        """Raise `ConfigurationError` if the plan cannot be executed; called before anything is written."""

    def run(self, plan: Plan) -> Generator[Outcome]:
        """Run or submit all experiments; yield one outcome each as soon as it is known.

        One bad experiment does not stop the others. When the iterator is closed early, what still runs on this
        machine is stopped.
        """

    def settled(self, folders: Collection[Path]) -> set[Path]:
        """Return those of its experiments' folders that need no rerun: complete, or still at work."""


def register_executor(name: str, path: str) -> None:
    """Make an executor known under a name.

    Args:
        name: Value of the execution mode that it serves.
        path: ``"package.module:attribute"``, a callable that returns an `Executor`; imported at first use.

    Raises:
        ConfigurationError: The path has another form.

    Example:
        >>> register_executor("local", "trainers.searches.local_executor:LocalExecutor")
    """
    if path.count(":") != 1:
        raise ConfigurationError(f"executor {name!r}: received {path!r}; expected 'package.module:attribute'")
    _EXECUTORS[name] = path


def available_executors() -> list[str]:
    """Names of the registered executors.

    Example:
        >>> available_executors()
        ['dry_run', 'local', 'slurm']
    """
    return sorted(_EXECUTORS)


def create_executor(name: str) -> Executor:
    """Load the named executor and make one.

    Args:
        name: One of `available_executors`.

    Returns:
        The executor.

    Raises:
        ConfigurationError: No executor of that name is registered.
        MissingExecutor: It cannot be imported; the message says what is missing.

    Example:
        >>> type(create_executor("dry_run")).__name__
        'DryRunExecutor'
    """
    if name not in _EXECUTORS:
        raise ConfigurationError(f"executor: received {name!r}; expected one of {available_executors()}")
    executor: Executor = _load(name, _EXECUTORS[name])()
    return executor


def create_launcher(name: str, project_root: Path, template_path: Path | None) -> Any:
    """Load the named launcher and make one.

    Args:
        name: Name of the executor that it belongs to.
        project_root: The project's folder.
        template_path: Template of job scripts; None leaves the choice to the launcher.

    Returns:
        The launcher.

    Raises:
        MissingExecutor: It cannot be imported; the message says what is missing.
    """
    return _load(name, _LAUNCHERS[name])(project_root, template_path)


def write_job_scripts(plan: Plan) -> list[str]:
    """Have every installed executor with job scripts write those that a run would submit.

    Args:
        plan: What would be executed.

    Returns:
        Names of the executors whose scripts were left out because they are not installed.
    """
    missing = []
    for name, path in _SCRIPT_WRITERS.items():
        try:
            write = _load(name, path)
        except MissingExecutor:
            missing.append(name)
        else:
            write(plan)
    return missing


def settled_folders(folders: Collection[Path]) -> set[Path]:
    """Ask the executors that last ran some experiments which of these need no rerun.

    Args:
        folders: Folders of experiments; those never run have no record and are not settled.

    Returns:
        The folders of experiments that are complete or still at work.

    Raises:
        ConfigurationError: A record cannot be read.
        MissingExecutor: An experiment was run by an executor that cannot be imported now.
    """
    by_executor: defaultdict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        record = read_record(folder)
        if record is not None:
            by_executor[record["executor"]].append(folder)
    return {folder for name, own in by_executor.items() for folder in create_executor(name).settled(own)}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what an executor recorded about an experiment, or None if it recorded nothing.

    Args:
        folder: Folder of the experiment.

    Raises:
        ConfigurationError: The record is damaged.
    """
    path = folder / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged: {error}. Remove it to have the experiment run again.") from error
    if not isinstance(record, dict) or not isinstance(record.get("executor"), str):
        raise ConfigurationError(
            f"{path}: received no text under the key 'executor'; expected one of {available_executors()}. "
            "Remove the file to have the experiment run again."
        )
    return record


def _load(name: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        missing = error.name or ""
        if isinstance(error, AttributeError) or missing.partition(".")[0] == module.partition(".")[0]:
            fix = "Install a version of modelbatch-hybrid that has it"
        else:
            fix = f"Run: pip install 'modelbatch-hybrid[{_EXTRAS.get(name, 'config')}]'"
        if name in _EXTRAS:
            fix += (
                ". Or pass another execution_mode: ExecutionMode.LOCAL runs experiments on this machine, "
                "ExecutionMode.DRY_RUN only writes their configurations and commands"
            )
        raise MissingExecutor(f"executor {name!r} needs {path}, which cannot be imported: {error}. {fix}") from error
