"""Which experiments can be trained as one batch: those that differ only in what a batch has for each model.

That is for each model: the numbers of optimizer and scheduler, the bound on gradient norms, the patience of early
stopping, the seed, and the numbers below ``custom_params.loss_args``; and where an experiment's own checkpoints lie.
Everything else is the signature of the batch: architecture, sizes, data, and whatever steers the loop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigurationError
from trainers.config.schema import ExperimentConfig

_LOGGER = logging.getLogger(__name__)

# How many experiments train at once unless the caller says otherwise: beyond it a model's time hardly falls, and so
# many grids still spread over several jobs.
DEFAULT_PACK_SIZE = 64

# What a batch has for each model, and what only labels an experiment.
_PER_MODEL = {
    "": {"seed", "experiment_name", "description", "tags", "created_by", "created_at", "version"},
    "training": {"learning_rate", "max_grad_norm", "early_stopping_patience"},
    "performance": {"clip_grad_norm"},
    "optimizer": {"learning_rate", "weight_decay", "betas", "eps"},
    "scheduler": {"warmup_steps", "max_steps", "min_lr", "gamma", "step_size", "milestones"},
    "checkpoint": {"checkpoint_dir", "filename"},
    "slurm": {"job_name"},
}
# Free-form dicts whose numbers are for each model.
_PER_MODEL_NUMBERS = (("optimizer", "custom_params"), ("scheduler", "custom_params"), ("custom_params", "loss_args"))


def batch_signature(config: ExperimentConfig) -> str:
    """Return a text that is the same for experiments that can be trained as one batch.

    Args:
        config: Of the experiment.

    Returns:
        JSON of everything that a batch has only once.

    Example:
        >>> from trainers.config.schema import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
        >>> def experiment(rate, width):
        ...     sections = ModelConfig("mlp", hidden_size=width), TrainingConfig(), DataConfig("digits")
        ...     return ExperimentConfig("e", *sections, OptimizerConfig(lr=rate))
        >>> batch_signature(experiment(0.1, 8)) == batch_signature(experiment(0.2, 8))
        True
        >>> batch_signature(experiment(0.1, 8)) == batch_signature(experiment(0.1, 16))
        False
    """
    content = dataclasses.asdict(config)
    for section, names in _PER_MODEL.items():
        own = content[section] if section else content
        if own is not None:
            for name in names:
                del own[name]
    for *path, name in _PER_MODEL_NUMBERS:
        own = content
        for part in path:
            own = own[part] or {}
        if isinstance(own.get(name), dict):
            own[name] = {key: _kind(value) for key, value in own[name].items()}
    return json.dumps(content, sort_keys=True)


def pack(configs: Sequence[ExperimentConfig], pack_size: int | None = None) -> list[list[int]]:
    """Divide experiments into packs, each to be trained as one batch.

    Args:
        configs: Of the experiments.
        pack_size: How many a pack may have. Default: 64; a pack that does not fit into memory is divided when it runs.

    Returns:
        Packs of indices into ``configs``: in each the experiments of one signature, in order.

    Raises:
        ConfigurationError: The size is no positive whole number.

    Example:
        >>> from trainers.config.schema import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
        >>> def experiment(seed, width):
        ...     sections = ModelConfig("mlp", hidden_size=width), TrainingConfig(), DataConfig("digits")
        ...     return ExperimentConfig("e", *sections, OptimizerConfig(), seed=seed)
        >>> pack([experiment(seed, width) for width in (8, 16) for seed in range(3)], pack_size=2)
        [[0, 1], [2], [3, 4], [5]]
    """
    size = DEFAULT_PACK_SIZE if pack_size is None else pack_size
    if type(size) is not int or size < 1:
        raise ConfigurationError(f"pack_size: received {pack_size!r}; expected a whole number >= 1, or None for 64")
    by_signature: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        by_signature.setdefault(batch_signature(config), []).append(index)
    return [alike[start : start + size] for alike in by_signature.values() for start in range(0, len(alike), size)]


def pack_name(build: str, experiments: Iterable[str]) -> str:
    """Return the name of a pack: the same for the same experiments in the same order.

    Args:
        build: ``"module:function"`` that builds them.
        experiments: Their names.

    Example:
        >>> pack_name("project:build", ["a", "b"])
        'pack_4e45644694eb'
    """
    text = json.dumps([build, *experiments])
    return f"pack_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


# Under the folder of a grid search: a folder a pack, with what it is to run, what became of it, and its checkpoints.
PACKS_FOLDER = "packs"
PACK_FILE = "pack.json"
OUTCOME_FILE = "outcome.json"


def pack_command(folder: str) -> list[str]:
    """Return the command that runs a pack, from the project's folder.

    Args:
        folder: Of the pack, which holds ``pack.json``.

    Example:
        >>> pack_command("packs/pack_4e45644694eb")[1:]
        ['-P', '-m', 'trainers.packed', 'packs/pack_4e45644694eb']
    """
    # -P: a folder of the project that is called like one of our packages must not take its place.
    return [sys.executable, "-P", "-m", "trainers.packed", folder]


def read_outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what became of the experiments of a pack.

    Args:
        folder: Of the pack.

    Returns:
        By experiment: ``state`` (``"COMPLETED"``, ``"FAILED"`` or ``"INTERRUPTED"``) and ``error``; empty if the pack
        has not begun, or the file cannot be read.
    """
    path = folder / OUTCOME_FILE
    try:
        outcomes: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _LOGGER.warning("%s cannot be read: %s. Its experiments count as not complete.", path, error)
        return {}
    return outcomes


def forget_outcomes(folder: Path) -> None:
    """Remove what an earlier run of a pack has said about its experiments.

    Args:
        folder: Of the pack.
    """
    (folder / OUTCOME_FILE).unlink(missing_ok=True)


def _kind(value: Any) -> Any:
    """A value as the signature sees it: numbers may differ, anything else may not."""
    return "number" if type(value) in (int, float) else [value]
