"""The command `modelbatch doctor`."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

import cli.doctor
from cli.app import app
from mb_torch import ModelBatch, Unsupported, available_backends


def test_says_which_backends_work_and_their_versions() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for name in available_backends():
        assert name in result.output
    assert result.output.count("works") == len(available_backends())
    assert "jax 0." in result.output


def test_says_what_is_missing_or_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(batch: ModelBatch) -> dict[str, Any]:
        if batch.backend.name == "jax":
            raise Unsupported("jax is not installed", fix="pip install 'modelbatch-hybrid[jax]'")
        return {"backend": "torch", "versions": {"torch": "9.9"}, "untested_versions": {"torch": "9.9"}}

    monkeypatch.setattr(ModelBatch, "backend_report", report)
    assert "pip install" in cli.doctor.examine("jax")["error"]
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "torch 9.9 (untested)" in " ".join(result.output.split())


def test_fails_if_the_default_backend_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.doctor, "examine", lambda name: {"error": f"{name} is broken"})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "torch is broken" in " ".join(result.output.split())
