"""The rungs of a halved run: between two selections it is a run like any other, with checkpoints in its own folder."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from trainers.checkpoints.slices import select_models
from trainers.checkpoints.store import CheckpointStore
from trainers.config.errors import ConfigurationError
from trainers.errors import MissingCheckpointError, TrainerError
from trainers.generic import GenericTrainer
from trainers.population.halving import Halving
from trainers.population.history import History
from trainers.ranks import on_first_rank
from trainers.reporting.loggers import absolute_places, at_places
from trainers.settings import GenericTrainerConfig

_LOGGER = logging.getLogger(__name__)
# What the models of a rung need to go on as if nothing had happened.
_PASSED_ON = ("save_last", "save_optimizer", "save_scheduler", "save_rng")


class Rungs:
    """The rungs of a run on disk: folders ``rung_0`` and so on, where those of a run without halving would be one.

    Args:
        config: Of the trainer, for the run as a whole.

    Example:
        >>> Rungs(GenericTrainerConfig(checkpoint_dir="runs", experiment_name="sweep")).config(2, 8).experiment_name
        'sweep_rung_2'
    """

    def __init__(self, config: GenericTrainerConfig) -> None:
        # Absolute: what a program does in a rung may change the working directory of the next.
        self._config = copy.deepcopy(config)
        self._config.checkpoint_dir = os.path.abspath(os.path.expanduser(config.checkpoint_dir))
        self._config.logging = at_places(config.logging, absolute_places(config.logging))

    def config(self, number: int, max_epochs: int) -> GenericTrainerConfig:
        """Return the trainer's config for a rung.

        Args:
            number: Of the rung, from 0.
            max_epochs: Epochs of the run by the end of the rung.
        """
        config = copy.deepcopy(self._config)
        name = f"rung_{number}"
        # Loggers have a folder of this name too: `<metric>_model_<i>` counts the models that are left.
        config.experiment_name = name if config.experiment_name is None else f"{config.experiment_name}_{name}"
        config.max_epochs = max_epochs
        config.auto_resume = config.auto_resume or number > 0
        return config

    def newest(self) -> tuple[int, dict[str, Any] | None]:
        """Return the number of the last rung that was begun, and its newest checkpoint; 0 and None without any.

        Raises:
            ConfigurationError: Something that a rung takes over from the one before is not saved.
            TrainerError: There are rungs but the run is to begin anew, or the run there was not halved.
        """
        missing = [name for name in _PASSED_ON if not getattr(self._config.checkpoint, name)]
        if missing:
            raise ConfigurationError(
                f"checkpoint: received {missing} switched off; expected them on, because the models that go on after a "
                "halving do so from a checkpoint"
            )
        whole = GenericTrainer(self._config).store
        whole.look()
        if whole.files:
            raise _of_another_kind(whole, "without halving")
        count = 0
        while self._store(count).folder.is_dir():
            count += 1
        for number in reversed(range(count)):
            store = self._store(number)
            store.look()
            # Where there is none, the process was killed before the rung began.
            if store.files:
                with contextlib.suppress(MissingCheckpointError):
                    content = store.newest()
                    if not self._config.auto_resume:
                        raise _of_another_kind(store, "from which auto_resume=False does not go on")
                    return number, content
        return 0, None

    def refuse_any(self) -> None:
        """Refuse to train without halving in the folder of a halved run.

        Raises:
            TrainerError: It is one.
        """
        store = self._store(0)
        store.look()
        if store.files:
            raise _of_another_kind(store, "with halving")

    def begin(self, number: int, content: dict[str, Any]) -> dict[str, Any]:
        """Write the checkpoint with which a rung begins, once for all processes.

        Args:
            number: Of the rung.
            content: Of the models that go on.

        Returns:
            The content as every process reads it.
        """
        store = self._store(number)
        with on_first_rank() as is_first:
            if is_first:
                with store.held():
                    store.save(
                        store.name_for(content["epoch"], content["global_step"], content["metrics"]),
                        {**content, "experiment_name": self.config(number, self._config.max_epochs).experiment_name},
                        is_ranked=True,
                        seconds=self._config.checkpoint.timeout_seconds,
                    )
        store.look()
        return store.newest()

    def _store(self, number: int) -> CheckpointStore:
        return GenericTrainer(self.config(number, self._config.max_epochs)).store


def _of_another_kind(store: CheckpointStore, kind: str) -> TrainerError:
    return TrainerError(
        "checkpoint_dir",
        received=f"{store.folder} with the checkpoints of a run {kind}",
        expected="a folder of this run alone",
        fix="Use another folder, or remove the checkpoints.",
    )


def halved(content: Mapping[str, Any], names: Sequence[str], halving: Halving) -> dict[str, Any]:
    """Return the checkpoint of the models that go on.

    Args:
        content: Of the end of a rung.
        names: Of all models of the population.
        halving: Says which go on.

    Returns:
        The content of these models, with the others dropped from the history.
    """
    history = History(names)
    history.begin(halving)
    history.load_state_dict(history_of(content))
    before = history.models
    # A model that was stopped is compared by what it had then: nothing, if that was before the first validation.
    values = {name: history.last(name).get(halving.metric, math.nan) for name in before}
    chosen = halving.chosen(values)
    history.drop_all_but(chosen, content["epoch"])
    for name in before:
        if name not in chosen:
            _LOGGER.info("%s is dropped: %s %.6g", name, halving.metric, values[name])
    _LOGGER.info(
        "%d of %d models go on after epoch %d: %s", len(chosen), len(before), content["epoch"], ", ".join(chosen)
    )
    selected = select_models(content, [before.index(name) for name in chosen])
    place = _place_of_history(content)
    callbacks = [
        {**entry, "state": history.state_dict()} if index == place else entry
        for index, entry in enumerate(content["callbacks"])
    ]
    # Every rung has log files of its own.
    return {**selected, "callbacks": callbacks, "trackers": {}}


def history_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state of the history in a checkpoint.

    Args:
        content: Of the checkpoint.

    Raises:
        TrainerError: It is of no population.
    """
    state: Mapping[str, Any] = content["callbacks"][_place_of_history(content)]["state"]
    return state


def _place_of_history(content: Mapping[str, Any]) -> int:
    classes = [entry["class"] for entry in content["callbacks"]]
    if History.__name__ not in classes:
        raise TrainerError("the checkpoint of a rung", received=f"one with callbacks {classes}", expected="a History")
    # The population's own is called first, and a user's class may have the same name.
    return classes.index(History.__name__)
