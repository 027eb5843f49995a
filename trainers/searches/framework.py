"""The main entry point: configurations, grid searches and launchers of one project."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from trainers.config import (
    ConfigurationError,
    ConfigurationManager,
    ExecutionMode,
    GridSearchConfig,
    GridSearchResult,
    NamingStrategy,
    ParameterGrid,
    ParameterGridSearch,
)
from trainers.config.grid_files import base_from_file
from trainers.searches.build_path import check_build_path
from trainers.searches.executors import Job, Outcome, Plan, create_executor, create_launcher
from trainers.searches.folder import GridFolder
from trainers.searches.nested import refuse_while_importing
from trainers.searches.packing import pack
from trainers.searches.results_file import RESULTS_FILE, ResultsFile

_LOGGER = logging.getLogger(__name__)

DEFAULT_SCRIPT = Path("scripts", "train.py")


class ModelTrainingFramework:
    """Configurations, grid searches and launchers of one project.

    Args:
        project_root: The project's folder.
        config_dir: Folder of its configurations; made if it is missing. Default: ``configs`` in the project.
        slurm_template_path: Template of Slurm job scripts. Default: the project's, else the one of the launcher.

    Attributes:
        project_root: As given, absolute.
        slurm_template_path: As given, absolute; None if not given.

    Raises:
        ConfigurationError: The project's folder or the template does not exist.

    Example:
        >>> import tempfile
        >>> grid = ParameterGrid("rates")
        >>> grid.add_parameter("optimizer.lr", [0.1, 0.01])
        >>> base = {"experiment_name": "run", "model": {"name": "mlp"}, "training": {}, "optimizer": {}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = ModelTrainingFramework(folder).run_grid_search(
        ...         [grid], {**base, "data": {"dataset_name": "digits"}}, execution_mode=ExecutionMode.DRY_RUN
        ...     )
        >>> result.submitted_jobs
        ['DRY_RUN', 'DRY_RUN']
    """

    def __init__(
        self,
        project_root: str | Path,
        config_dir: str | Path | None = None,
        slurm_template_path: str | Path | None = None,
    ) -> None:
        self.project_root = Path(os.path.expanduser(project_root)).absolute()
        if not self.project_root.is_dir():
            raise ConfigurationError(f"project_root: received {project_root}, which is no directory; expected one")
        self.slurm_template_path = None
        if slurm_template_path is not None:
            self.slurm_template_path = self._in_project(slurm_template_path)
            if not self.slurm_template_path.is_file():
                raise ConfigurationError(
                    f"slurm_template_path: received {slurm_template_path}, but {self.slurm_template_path} does not "
                    "exist; expected a template of a job script, or None for the project's own or the packaged one"
                )
        self._config_manager = ConfigurationManager(self.project_root, None if config_dir is None else Path(config_dir))

    def run_grid_search(
        self,
        parameter_grids: list[ParameterGrid],
        base_config: dict[str, Any] | str | Path | None = None,
        base_config_path: str | Path | None = None,
        execution_mode: ExecutionMode = ExecutionMode.SLURM,
        output_dir: Path | None = None,
        max_concurrent_jobs: int | None = None,
        *,
        naming_strategy: NamingStrategy = NamingStrategy.HASH_BASED,
        script_path: str | Path | None = None,
        rerun_failed_only: bool = False,
        build: str | None = None,
        pack_size: int | None = None,
        backend: str | None = None,
    ) -> GridSearchResult:
        """Run an experiment for every combination of the grids.

        Everything is checked before anything is written or started. One bad run does not stop the others.

        An experiment is a script, which runs in a process of its own, or it is built by a function: then those that
        differ only in what a batch has for each model (see `packing`) are trained at once, and each still has
        its own folder with configuration, metrics and checkpoints.

        Args:
            parameter_grids: The grids, one after another.
            base_config: What all experiments share: a dict, or the path of a file.
            base_config_path: Path of a file; exactly one of the two is given.
            execution_mode: ``SLURM`` submits batch jobs and returns; ``LOCAL`` runs child processes and returns when
                all have ended; ``DRY_RUN`` writes configurations and commands only.
            output_dir: Folder for everything that is written. Default: ``experiments/grid_search_<date>_<time>`` in
                the project. Experiments of another configuration that are there already are never overwritten.
            max_concurrent_jobs: How many experiments, or packs of built ones, may run at once. Default: one locally,
                no limit with Slurm.
            naming_strategy: How the experiments are called.
            script_path: The training script, relative to the project. Default: ``scripts/train.py``. It gets
                ``--config FILE --experiment-name NAME --output-dir FOLDER``. Exit code 0 means complete; 75
                (`GenericTrainer.exit_code`) means interrupted, and to be run again. Metrics for the table are those in
                ``metrics.csv`` in its folder (rows of ``step,epoch,name,value``), as ``logging.csv_log_dir`` writes it.
            rerun_failed_only: Of the grid search in ``output_dir``, run what is neither complete nor at work, under the
                same names; the result counts these only, its table has all.
            build: ``"module:function"``, importable from the project's folder: ``function(config)`` returns a
                ``model_training_framework.trainer.Built``. Then ``script_path`` is not used.
            pack_size: How many built experiments are trained at once. Default: 64, or as many as fit into memory.
            backend: Of the batches of built experiments, ``"auto"`` to try which is the fastest. Default: as for
                `mb_torch.ModelBatch`.

        Returns:
            What became of each experiment, with a table of their metrics; the same is in ``results.csv`` in the output
            folder, which is kept up to date while experiments end.

        Raises:
            ValidationError: Grids or experiments are invalid; all problems are listed.
            ConfigurationError: Arguments contradict each other, the script is missing, the executor is not installed,
                or the output folder holds something else or is in use.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     ModelTrainingFramework(folder).run_grid_search([], {})
            Traceback (most recent call last):
            ...
            trainers.config.errors.ValidationError: 1 problem in the grid search:
              - parameter_grids: received 0 grids, none with a parameter; expected at least one with some
        """
        refuse_while_importing()
        start, moment = time.monotonic(), datetime.now()
        mode = _checked_mode(execution_mode)
        _check_jobs_at_once(max_concurrent_jobs)
        if rerun_failed_only and output_dir is None:
            raise ConfigurationError("rerun_failed_only: received no output_dir; expected that of the earlier search")
        _check_build(build, pack_size, backend, script_path, self.project_root)
        search = self._search(parameter_grids, base_config, base_config_path, naming_strategy)
        folder = GridFolder(self._output_dir(output_dir, moment), self._config_manager)
        if rerun_failed_only:
            moment = folder.moment_of_earlier_search(naming_strategy) or moment
        experiments = search.named_experiments(moment)
        plan = Plan(
            tuple(
                Job(index, config.experiment_name, config, folder.path / config.experiment_name)
                for index, config in enumerate(experiments)
            ),
            script_path=self._in_project(DEFAULT_SCRIPT if script_path is None else script_path),
            project_root=self.project_root,
            output_dir=folder.path,
            max_concurrent_jobs=max_concurrent_jobs,
            template_path=self.slurm_template_path,
            build=build,
            pack_size=pack_size,
            backend=backend,
        )
        executor = create_executor(mode.value)
        executor.check(plan)
        asked = GridSearchConfig(
            name=search.name,
            base_config=search.base_config,
            parameter_grids=search.parameter_grids,
            naming_strategy=naming_strategy,
            max_concurrent_jobs=max_concurrent_jobs,
            execution_mode=mode,
            output_dir=folder.path,
        )
        outcomes: list[Outcome] = []
        with folder.lock() as lock:
            # A dry run has no results, and leaves those of a run as they are.
            results_path = None if mode is ExecutionMode.DRY_RUN else folder.path / RESULTS_FILE
            results = ResultsFile(results_path, plan.jobs, search.parameter_grids)
            folder.refuse_other_configurations(plan.jobs)
            if rerun_failed_only:
                plan = replace(plan, jobs=folder.unsettled(plan.jobs))
            folder.write_plan(search, plan)
            # So that a rerun finds what it needs even if this process is killed.
            folder.write_summary(_result(asked, plan.jobs, [], time.monotonic() - start), moment)
            try:
                with closing(executor.run(replace(plan, lock=lock))) as running:
                    for outcome in running:
                        outcomes.append(outcome)  # one at a time: those before an interrupt are kept
                        results.note(outcome)
            except (KeyboardInterrupt, SystemExit):
                complete = sum(outcome.error is None for outcome in outcomes)
                _LOGGER.warning(
                    "the grid search was stopped; %d of %d experiments are complete. To go on, call it again with "
                    "output_dir=%r and rerun_failed_only=True",
                    complete,
                    len(plan.jobs),
                    str(folder.path),
                )
                raise
            finally:
                result = _result(asked, plan.jobs, outcomes, time.monotonic() - start)
                folder.write_summary(result, moment)
                result.experiments = results.end()
        return result

    def get_config_manager(self) -> ConfigurationManager:
        """Return the configuration manager of the project, the same one each time."""
        return self._config_manager

    def get_slurm_launcher(self) -> Any:
        """Return a Slurm launcher for the project.

        Raises:
            MissingExecutor: The package with the launcher, or one that it needs, is not installed.
        """
        return create_launcher("slurm", self.project_root, self.slurm_template_path)

    def _in_project(self, path: str | Path) -> Path:
        return (self.project_root / os.path.expanduser(path)).absolute()

    def _output_dir(self, output_dir: str | Path | None, moment: datetime) -> Path:
        if output_dir is not None:
            return Path(os.path.expanduser(output_dir)).absolute()
        first = self.project_root / "experiments" / f"grid_search_{moment:%Y%m%d_%H%M%S}"
        numbered = (first.with_name(f"{first.name}_{number}") for number in itertools.count(2))
        return next(path for path in itertools.chain([first], numbered) if not path.exists())

    def _search(
        self,
        grids: Sequence[ParameterGrid],
        base_config: Mapping[str, Any] | str | Path | None,
        base_config_path: str | Path | None,
        naming_strategy: NamingStrategy,
    ) -> ParameterGridSearch:
        if (base_config is None) == (base_config_path is None):
            received = "neither" if base_config is None else "both"
            raise ConfigurationError(f"received {received} of base_config and base_config_path; expected exactly one")
        given, compose = base_config if base_config_path is None else base_config_path, None
        if isinstance(given, str | Path):
            given, compose = base_from_file(self._config_manager, given)
        if not isinstance(given, Mapping):
            raise ConfigurationError(f"base_config: received a {type(given).__name__}; expected a dict or a path")
        if not isinstance(grids, Sequence) or not all(isinstance(grid, ParameterGrid) for grid in grids):
            received = f"a {type(grids).__name__}" if not isinstance(grids, Sequence) else repr(grids)
            raise ConfigurationError(f"parameter_grids: received {received}; expected a list of ParameterGrid")
        search = ParameterGridSearch(given, compose=compose)
        search.set_naming_strategy(naming_strategy)
        for grid in grids:
            search.add_grid(grid)
        search.name = "+".join(grid.name for grid in grids)
        return search


def _checked_mode(mode: object) -> ExecutionMode:
    if not isinstance(mode, ExecutionMode):
        known = ", ".join(str(known) for known in ExecutionMode)
        raise ConfigurationError(f"execution_mode: received {mode!r}; expected one of {known}")
    return mode


def _check_jobs_at_once(count: object) -> None:
    if count is not None and (type(count) is not int or count < 1):
        raise ConfigurationError(f"max_concurrent_jobs: received {count!r}; expected a whole number >= 1, or None")


def _check_build(
    build: object, pack_size: int | None, backend: object, script_path: object, project_root: Path
) -> None:
    if build is None:
        for name, value in (("pack_size", pack_size), ("backend", backend)):
            if value is not None:
                raise ConfigurationError(f"{name}: received {value!r} without build; expected it with build only")
        return
    pack([], pack_size)  # refuses a bad size
    if script_path is not None:
        raise ConfigurationError("received both build and script_path; expected one of them")
    if backend is not None and not isinstance(backend, str):
        raise ConfigurationError(f"backend: received {backend!r}; expected the name of one, 'auto', or None")
    check_build_path(build, project_root)


def _result(
    asked: GridSearchConfig, jobs: Sequence[Job], outcomes: Sequence[Outcome], seconds: float
) -> GridSearchResult:
    by_index = {outcome.job.index: outcome for outcome in outcomes}
    known = [by_index.get(job.index, Outcome(job, error="not complete: the run was interrupted")) for job in jobs]
    return GridSearchResult(
        grid_config=asked,
        total_experiments=len(jobs),
        generated_experiments=[job.config for job in jobs],
        submitted_jobs=[outcome.job_id for outcome in known if outcome.job_id is not None],
        failed_submissions=[(outcome.job.name, outcome.error) for outcome in known if outcome.error is not None],
        execution_time=seconds,
        output_directory=asked.output_dir,
    )
