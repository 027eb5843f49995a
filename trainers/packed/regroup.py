"""Where experiments of a pack go on that were trained in other packs before."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.checkpoints.slices import join, select_models
from trainers.checkpoints.store import CheckpointStore
from trainers.config.files import write_atomically, written
from trainers.errors import MissingCheckpointError, TrainerError
from trainers.population import History

_LOGGER = logging.getLogger(__name__)
# Beside the checkpoints of experiments that train together: who they are.
MEMBERS_FILE = "members.json"

Content = dict[str, Any]


def write_members(folder: Path, build: str, names: Sequence[str]) -> None:
    """Note whose checkpoints a folder has, so that they are found without opening any.

    Args:
        folder: Of experiments that train together; made if it is missing.
        build: ``"module:function"`` that builds them.
        names: Of the experiments.
    """
    write_atomically(folder / MEMBERS_FILE, written({"build": build, "experiments": list(names)}, "json"))


def starting_points(
    packs: Path, build: str, names: Sequence[str], part_folder: Callable[[Sequence[str]], Path]
) -> list[tuple[list[str], Content | None]]:
    """Divide experiments by the place from which they go on: each from its newest checkpoint, in whatever pack.

    Args:
        packs: Folder of all packs of the grid search.
        build: ``"module:function"`` that builds the experiments.
        names: Of the experiments.
        part_folder: The folder in which given experiments train together.

    Returns:
        Groups of names that stand at the same place, each with the content of the checkpoint from which it goes on;
        None where the group begins, or goes on from the newest checkpoint in its own folder.
    """
    own = part_folder(names)
    others = [path for path in _folders_with(packs, build, names) if path != own]
    if not others:
        return [(list(names), None)]
    newest: dict[str, _Source] = {}
    for source in filter(None, map(_source, [own, *others])):
        for name in source.names:
            if name not in newest or source.step > newest[name].step:
                newest[name] = source
    begins = [name for name in names if name not in newest]
    groups: list[tuple[list[str], Content | None]] = [(begins, None)] if begins else []
    by_place: dict[str, dict[_Source, list[str]]] = {}
    for name in names:
        if name in newest:
            source = newest[name]
            by_place.setdefault(source.place, {}).setdefault(source, []).append(name)
    for parts in by_place.values():
        source = next(iter(parts))
        if len(parts) == 1 and source.folder == part_folder(parts[source]):
            groups.append((parts[source], None))
        else:
            groups.extend(_together(parts, names))
    return groups


class _Source:
    """The newest checkpoint of experiments that trained together.

    Attributes:
        folder: Where it lies.
        content: Of the checkpoint.
        names: Of the experiments, in the order of its models.
        step: Optimizer steps done.
        place: Where the run stands; runs at the same place can go on together.
    """

    def __init__(self, folder: Path, content: Content) -> None:
        self.folder = folder
        self.content = content
        # From the checkpoint itself: names and models belong together.
        (history,) = [entry["state"] for entry in content["callbacks"] if entry["class"] == History.__name__]
        self.names: list[str] = history["models"]
        self.step = content["global_step"]
        state = content["resume_state"]
        batches = [None if state[part] is None else state[part]["batch_idx"] for part in ("train", "val")]
        self.place = json.dumps([state["phase"], state["epoch"], state["global_step"], *batches])


def _folders_with(packs: Path, build: str, names: Sequence[str]) -> Iterator[Path]:
    """Folders with checkpoints of some of the experiments."""
    for path in sorted(packs.glob(f"*/{MEMBERS_FILE}")):
        try:
            members = json.loads(path.read_text(encoding="utf-8"))
            if members["build"] == build and not set(names).isdisjoint(members["experiments"]):
                yield path.parent
        except (ValueError, KeyError, TypeError) as error:
            _LOGGER.warning("%s is damaged (%r): no experiment goes on from the checkpoints beside it", path, error)


def _source(folder: Path) -> _Source | None:
    """None without a checkpoint that can be read."""
    store = CheckpointStore(folder)
    if not folder.is_dir():
        return None
    store.look()
    try:
        return _Source(folder, store.newest()) if store.files else None
    except (MissingCheckpointError, KeyError, ValueError) as error:
        _LOGGER.warning("no experiment goes on from the checkpoints in %s: %s", folder, error)
        return None


def _together(parts: Mapping[_Source, Sequence[str]], names: Sequence[str]) -> list[tuple[list[str], Content | None]]:
    """Experiments at one place as one run, in the given order; as several, if the runs went over other data."""
    contents = [_of_experiments(source.content, source.names, own) for source, own in parts.items()]
    try:
        content = join(contents)
    except TrainerError as error:
        _LOGGER.warning("experiments of different packs go on apart: %s", error)
        return list(zip(map(list, parts.values()), contents, strict=True))
    entries = zip(*(content["callbacks"] for content in contents), strict=True)
    content["callbacks"] = [{**own[0], "state": _joined([entry["state"] for entry in own])} for own in entries]
    together = [name for own in parts.values() for name in own]
    ordered = [name for name in names if name in together]
    return [(ordered, _of_experiments(content, together, ordered))]


def _of_experiments(content: Content, names: Sequence[str], chosen: Sequence[str]) -> Content:
    """The checkpoint of some of the experiments, in the given order, with what callbacks know of them."""
    callbacks = []
    for entry in content["callbacks"]:
        state = dict(entry["state"])
        state["by_model"] = {name: state["by_model"][name] for name in chosen if name in state["by_model"]}
        if "models" in state:
            state["models"] = list(chosen)
        callbacks.append({**entry, "state": state})
    return {**select_models(content, [names.index(name) for name in chosen]), "callbacks": callbacks}


def _joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of one callback in several packs, which tell experiments apart by name."""
    joined = {**states[0], "by_model": {name: own for state in states for name, own in state["by_model"].items()}}
    if "models" in joined:
        joined["models"] = [name for state in states for name in state["models"]]
    return joined
