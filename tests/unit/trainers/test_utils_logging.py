"""Logging: no line twice, nobody else's handler touched, every option with an effect."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainers.utils import get_logger, setup_logging
from trainers.utils.logging import remove_handlers

NAME = "tests.of.logging"


@pytest.fixture(autouse=True)
def _clean_up() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    for name in (None, NAME, f"{NAME}.child"):
        remove_handlers(logging.getLogger(name))
        logging.getLogger(name).setLevel(level if name is None else logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_returns_the_logger_and_repeated_calls_double_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        logger = setup_logging(level="INFO", log_file=tmp_path / "a.log", logger_name=NAME)
    assert logger is get_logger(NAME)
    logger.info("hello %d", 1)
    assert capsys.readouterr().err.count("hello 1") == 1
    assert (tmp_path / "a.log").read_text().count("hello 1") == 1


def test_a_message_through_several_loggers_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(log_file=tmp_path / "all.log")
    setup_logging(log_file=tmp_path / "all.log", logger_name=NAME)
    child = setup_logging(log_file=tmp_path / "child.log", logger_name=f"{NAME}.child")
    child.warning("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "all.log").read_text().count("once") == 1
    assert (tmp_path / "child.log").read_text().count("once") == 1


def test_root_logger_shows_everybody(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup_logging(level="INFO") is logging.getLogger()
    get_logger("somebody.else").info("their message")
    assert "their message" in capsys.readouterr().err


def test_foreign_handlers_stay(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    foreign = logging.StreamHandler(stream)
    logger = logging.getLogger(NAME)
    logger.addHandler(foreign)
    try:
        setup_logging(logger_name=NAME)
        setup_logging(logger_name=NAME, level="ERROR")
        assert foreign in logger.handlers
        logger.error("both")
    finally:
        logger.removeHandler(foreign)
    assert stream.getvalue() == "both\n"
    assert capsys.readouterr().err.count("both") == 1


def test_a_later_call_replaces_the_file(tmp_path: Path) -> None:
    setup_logging(log_file=tmp_path / "first.log", logger_name=NAME).info("one")
    setup_logging(log_file=tmp_path / "second.log", logger_name=NAME).info("two")
    assert "two" not in (tmp_path / "first.log").read_text()
    assert "one" not in (tmp_path / "second.log").read_text()


@pytest.mark.parametrize(("level", "number"), [("debug", 10), ("WARNING", 30), (" Error ", 40), (25, 25), (0, 1)])
def test_level_as_name_or_number(level: int | str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    logger = setup_logging(level=level, logger_name=NAME)
    assert logger.level == number
    logger.log(number, "shown")
    logger.log(number - 1, "hidden")
    assert capsys.readouterr().err.strip().endswith("shown")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"level": "LOUD"}, "level: received 'LOUD'"),
        ({"level": True}, "level: received True"),
        ({"level": -1}, "level: received -1"),
        ({"max_file_size": -1}, "max_file_size: received -1"),
        ({"backup_count": -1}, "backup_count: received -1"),
        ({"format_string": "%(message"}, "format"),
        ({"log_dir": "a", "log_file": "/elsewhere/x.log"}, "log_file: received"),
    ],
)
def test_wrong_options_change_nothing(options: dict[str, Any], named: str) -> None:
    logger = setup_logging(level="INFO", logger_name=NAME)
    before = list(logger.handlers)
    with pytest.raises(ValueError, match=named):
        setup_logging(**options, logger_name=NAME)
    assert (logger.handlers, logger.level) == (before, 20)


def test_log_dir(tmp_path: Path) -> None:
    setup_logging(log_dir=tmp_path / "new", logger_name=NAME).info("default name")
    setup_logging(log_dir=tmp_path / "new", log_file="own.log", logger_name=NAME).info("own name")
    assert "default name" in (tmp_path / "new" / "framework.log").read_text()
    assert "own name" in (tmp_path / "new" / "own.log").read_text()


def test_files_rotate(tmp_path: Path) -> None:
    logger = setup_logging(log_file=tmp_path / "a.log", max_file_size=200, backup_count=2, logger_name=NAME)
    for number in range(30):
        logger.info("message %d", number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2"]


def test_default_rotation(tmp_path: Path) -> None:
    handler: Any = setup_logging(log_file=tmp_path / "a.log", logger_name=NAME).handlers[1]
    assert (handler.maxBytes, handler.backupCount) == (10 * 1024 * 1024, 5)


def test_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(
        log_file=tmp_path / "a.log", format_string="%(asctime)s|%(message)s", date_format="%Y!", logger_name=NAME
    ).info("é")
    line = capsys.readouterr().err.strip()
    assert line.endswith("!|é")
    assert (tmp_path / "a.log").read_text(encoding="utf-8").strip() == line


def test_colors_on_terminals_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, terminal = tmp_path / "a.log", Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_logging(log_file=path, logger_name=NAME).error("bad")
    assert "\033[31mERROR\033[0m" in terminal.getvalue()
    assert "\033" not in path.read_text()
    terminal.truncate(0)
    setup_logging(use_colors=False, logger_name=NAME).error("plain")
    monkeypatch.setenv("NO_COLOR", "1")
    setup_logging(logger_name=NAME).error("plain")
    monkeypatch.delenv("NO_COLOR")
    assert terminal.getvalue().count("plain") == 2
    assert "\033" not in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logging.getLogger(NAME).error("not a terminal")
    assert "\033" not in sys.stderr.getvalue()  # type: ignore[attr-defined]
