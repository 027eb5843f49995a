"""States and files that do not fit: the error names the model and the key; nothing is loaded, executed or lost."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mb_torch import InvalidState, MissingState, ModelBatch
from tests.compare import assert_equal
from tests.refusals import mlp, optimizer_for, refused


@pytest.fixture
def mb() -> ModelBatch:
    return ModelBatch([mlp() for _ in range(3)], seeds=[1, 2, 3])


# States


def change_state(states: list[dict[str, Tensor]], change: str) -> Any:
    if change == "missing":
        del states[2]["4.bias"]
    elif change == "unknown":
        states[2]["4.extra"] = torch.zeros(1)
    elif change == "shape":
        states[2]["4.bias"] = torch.zeros(4)
    elif change == "broadcasts":
        states[2]["4.bias"] = torch.zeros(1)
    elif change == "dtype":
        states[2]["4.bias"] = states[2]["4.bias"].double()
    elif change == "type":
        states[2]["4.bias"] = [0.0, 0.0, 0.0]  # type: ignore[assignment]
    elif change == "buffer":
        states[2]["1.running_mean"] = torch.zeros(9)
    elif change == "too few":
        states.pop()
    elif change == "too many":
        states.append(states[0])
    elif change == "no mapping":
        states[2] = torch.zeros(3)  # type: ignore[call-overload]
    return states


STATE_ERRORS = {
    "missing": r"model 2 does not fit: missing keys \['4.bias'\]",
    "unknown": r"model 2 does not fit: .*unknown keys \['4.extra'\]",
    "shape": r"model 2, key '4.bias': received torch.float32 of shape \(4,\); expected torch.float32 of shape \(3,\)",
    "broadcasts": r"model 2, key '4.bias': received torch.float32 of shape \(1,\)",
    "dtype": r"model 2, key '4.bias': received torch.float64",
    "type": r"model 2, key '4.bias': received list; expected a tensor",
    "buffer": r"model 2, key '1.running_mean': received torch.float32 of shape \(9,\)",
    "too few": "received 2 states; expected 3, one per model",
    "too many": "received 4 states; expected 3",
    "no mapping": "state of model 2: received Tensor; expected a state_dict",
}


@pytest.mark.parametrize("change", STATE_ERRORS)
def test_states_that_do_not_fit(mb: ModelBatch, change: str) -> None:
    states = change_state([dict(mlp().state_dict()) for _ in range(3)], change)
    optimizer = optimizer_for(mb)
    with refused(mb, InvalidState, STATE_ERRORS[change], optimizer):
        mb.load_model_states(states)


def test_tied_tensors_with_two_values() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.other.weight = self.one.weight

    mb = ModelBatch([Tied() for _ in range(2)])
    states = mb.get_model_states()
    states[1]["other.weight"] = states[1]["other.weight"] + 1
    with refused(mb, InvalidState, "model 1: 'other.weight' and 'one.weight' are one tied tensor"):
        mb.load_model_states(states)


@pytest.mark.parametrize("spoilt", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"])
def test_states_without_values(mb: ModelBatch, spoilt: Any) -> None:
    states = [{key: value + 1 for key, value in state.items()} for state in mb.get_model_states()]
    key = next(iter(states[2]))
    states[2][key] = spoilt(states[2][key])
    with refused(mb, InvalidState, f"model 2, key '{key}'.*expected a dense tensor with values"):
        mb.load_model_states(states)


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ModelBatch([mlp() for _ in range(3)]).save_all(tmp_path)
    return tmp_path


def test_a_missing_file(mb: ModelBatch, folder: Path) -> None:
    (folder / "model_1.pt").unlink()
    with refused(mb, MissingState, r"1 of 3 model files do not exist: .*model_1\.pt.*Nothing was loaded"):
        mb.load_all(folder)
    with pytest.raises(FileNotFoundError):
        mb.load_all(folder)


def test_threads_may_save_to_one_folder(mb: ModelBatch, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: mb.save_all(tmp_path), range(40)))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"model_{i}.pt" for i in range(3)]
    mb.load_all(tmp_path)


def test_a_missing_folder(mb: ModelBatch, tmp_path: Path) -> None:
    with refused(mb, MissingState, "3 of 3 model files do not exist"):
        mb.load_all(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file(mb: ModelBatch, folder: Path, kept: float) -> None:
    content = (folder / "model_2.pt").read_bytes()
    (folder / "model_2.pt").write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with refused(mb, InvalidState, r"model_2\.pt cannot be read.*Nothing was loaded") as caught:
        mb.load_all(folder)
    # torch's own message advises to allow the file to run code.
    assert "weights_only" not in str(caught.value)


def test_a_file_that_is_no_state(mb: ModelBatch, folder: Path) -> None:
    torch.save([torch.zeros(1)], folder / "model_2.pt")
    with refused(mb, InvalidState, r"model_2\.pt: received list; expected a state_dict"):
        mb.load_all(folder)


def test_a_file_of_another_model(mb: ModelBatch, folder: Path) -> None:
    torch.save(nn.Linear(4, 3).state_dict(), folder / "model_2.pt")
    with refused(mb, InvalidState, "model 2 does not fit: missing keys"):
        mb.load_all(folder)


class Payload:
    """Unpickling it calls a function of the attacker's choice."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PAYLOAD_TARGET"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_are_not_executed(mb: ModelBatch, folder: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYLOAD_TARGET", str(folder / "executed"))
    state = {**mlp().state_dict(), "4.bias": Payload()}
    torch.save(state, folder / "model_2.pt", _use_new_zipfile_serialization=zipped)
    with refused(mb, InvalidState, r"model_2\.pt cannot be read"):
        mb.load_all(folder)
    assert not (folder / "executed").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (folder / "executed").exists(), "the payload does nothing, so the test shows nothing"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saving_that_fails_leaves_the_old_files(mb: ModelBatch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    save, calls = torch.save, []

    def fail_in_the_middle(value: Any, stream: Any, *args: Any, **options: Any) -> None:
        calls.append(value)
        if len(calls) == 2:
            stream.write(b"half a file")
            raise OSError(28, "No space left on device")
        save(value, stream, *args, **options)

    monkeypatch.setattr(torch, "save", fail_in_the_middle)
    with pytest.raises(OSError, match="No space left"):
        mb.save_all(folder)
    assert names(folder) == ["model_0.pt", "model_1.pt", "model_2.pt"]
    assert (folder / "model_1.pt").read_bytes() == old["model_1.pt"]
    assert (folder / "model_2.pt").read_bytes() == old["model_2.pt"]
    assert_equal(torch.load(folder / "model_0.pt", weights_only=True), dict(mb.get_model_states()[0]))


def test_a_file_appears_whole_or_not_at_all(mb: ModelBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch writes goes somewhere else first, and is renamed only after it reached the disk."""
    seen: list[list[str]] = []
    save, flushed = torch.save, []

    def spy(value: Any, *args: Any, **options: Any) -> None:
        save(value, *args, **options)
        seen.append([name for name in names(tmp_path) if name.endswith(".pt")])

    monkeypatch.setattr(torch, "save", spy)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(names(tmp_path)), fsync(descriptor)))
    mb.save_all(tmp_path)
    assert seen == [[], ["model_0.pt"], ["model_0.pt", "model_1.pt"]]
    assert len(flushed) >= 3
    assert all("model_2.pt" not in earlier for earlier in flushed[:3])
    assert names(tmp_path) == ["model_0.pt", "model_1.pt", "model_2.pt"]


def test_a_stray_temporary_file_does_no_harm(mb: ModelBatch, folder: Path) -> None:
    (folder / ".model_1.pt.123.tmp").write_bytes(b"left by a crash")
    mb.load_all(folder)
    mb.save_all(folder)
    mb.load_all(folder)


def test_a_file_in_the_place_of_the_folder(mb: ModelBatch, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken"):
        mb.save_all(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "a file"
