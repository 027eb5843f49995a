"""The command `modelbatch doctor`."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

import cli.doctor
import cli.main
from cli.app import app
from mb_torch import ModelBatch, Unsupported, available_backends
from tests.arch.repository import run_python

WITHOUT = "import sys; sys.modules.update(dict.fromkeys({modules})); "
COMMAND = "import cli.main; sys.argv = ['modelbatch', 'doctor']; cli.main.main()"


def test_says_which_backends_work_and_their_versions() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for name in available_backends():
        assert name in result.output
    assert result.output.count("works") == len(available_backends())
    assert "jax 0." in result.output
    assert "default backend: torch ($MODELBATCH_BACKEND is not set)" in result.output


def test_says_what_is_missing_or_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(batch: ModelBatch) -> dict[str, Any]:
        if batch.backend.name == "jax":
            raise Unsupported("jax is not installed", fix="pip install 'modelbatch-hybrid[jax]'")
        return {"backend": "torch", "versions": {"torch": "9.9"}, "untested_versions": {"torch": "9.9"}}

    monkeypatch.setattr(ModelBatch, "backend_report", report)
    assert "pip install" in cli.doctor.examine("jax")["error"]
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "torch 9.9 (untested)" in result.output


def test_fails_if_the_default_backend_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.doctor, "examine", lambda name: {"error": f"{name} is broken"})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "torch is broken" in result.output


def test_needs_no_package_of_the_demo() -> None:
    finished = run_python(WITHOUT.format(modules=[*cli.main.REQUIRED]) + COMMAND)
    assert finished.stdout.count("works") == len(available_backends())


@pytest.mark.long
def test_shows_the_whole_command_that_installs_what_is_missing() -> None:
    finished = run_python(WITHOUT.format(modules=["jax"]) + COMMAND)
    assert "pip install 'modelbatch-hybrid[jax]'" in finished.stdout


@pytest.mark.parametrize(
    ("chosen", "code", "problem"),
    [
        ("jax", 0, None),
        ("tpu", 1, "Problem: $MODELBATCH_BACKEND is 'tpu', which is no backend; set it to one of ['jax', 'torch']"),
        ("torch", 1, "Problem: the default backend, torch, does not work."),
    ],
)
def test_says_where_the_default_comes_from(
    chosen: str, code: int, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = {"jax": {"backend": "jax"}, "torch": {"error": "torch is broken"}}
    monkeypatch.setattr(cli.doctor, "examine", reports.get)
    result = CliRunner().invoke(app, ["doctor"], env={"MODELBATCH_BACKEND": chosen})
    assert f"default backend: {chosen} (from $MODELBATCH_BACKEND)" in result.output
    assert result.exit_code == code
    assert problem in result.output if problem else "Problem" not in result.output
