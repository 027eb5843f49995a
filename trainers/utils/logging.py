"""Logging to the console and to rotating files."""

from __future__ import annotations

import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

DEFAULT_FORMAT = "%(asctime)s %(levelname)-8s %(name)s: %(message)s"
DEFAULT_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
DEFAULT_FILE = "framework.log"
MAX_FILE_SIZE = 10 * 1024 * 1024
BACKUP_COUNT = 5

_COLORS = {
    logging.DEBUG: "36",
    logging.INFO: "32",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "1;31",
}


def setup_logging(
    level: int | str = "INFO",
    log_file: str | os.PathLike[str] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    max_file_size: int = MAX_FILE_SIZE,
    backup_count: int = BACKUP_COUNT,
    use_colors: bool = True,
    format_string: str | None = None,
    date_format: str | None = None,
    logger_name: str | None = None,
) -> logging.Logger:
    """Send a logger's messages to stderr and, if wanted, to a rotating file.

    Each call describes the whole set-up of its logger: what an earlier call attached is replaced, handlers that
    others attached stay. A message that reaches several loggers set up here is shown once.

    Args:
        level: Name or number of the least level that is shown.
        log_file: File to write to as well; a relative one lies in ``log_dir`` if that is given.
        log_dir: Folder of the log file; without ``log_file`` the file is called ``framework.log``.
        max_file_size: Bytes after which a new file is begun; 0 never begins one.
        backup_count: How many old files are kept; 0 keeps one file that grows.
        use_colors: Colour the level on terminals, unless ``$NO_COLOR`` is set.
        format_string: Format of a line, as `logging.Formatter` takes it.
        date_format: Format of its time, as `time.strftime` takes it.
        logger_name: The logger. Default: the root logger, which gets the messages of all.

    Returns:
        The logger.

    Raises:
        ValueError: An unknown level, a bad format, a negative size or count, or a log file outside ``log_dir``.

    Example:
        >>> logger = setup_logging(level="debug", logger_name="example")
        >>> logger.level, len(logger.handlers)
        (10, 1)
        >>> len(setup_logging(level=30, logger_name="example").handlers)  # replaced, not added
        1
        >>> remove_handlers(logger)
    """
    number = _level_number(level)
    for name, size in {"max_file_size": max_file_size, "backup_count": backup_count}.items():
        if size < 0:
            raise ValueError(f"{name}: received {size}; expected a number >= 0")
    line, date = format_string or DEFAULT_FORMAT, date_format or DEFAULT_DATE_FORMAT
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    handlers[0].setFormatter(_ConsoleFormatter(line, date, use_colors))
    path = _log_path(log_file, log_dir)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_FileHandler(path, max_file_size, backup_count))
        handlers[1].setFormatter(logging.Formatter(line, date))

    logger = logging.getLogger(logger_name)
    remove_handlers(logger)
    # 0 would mean the level of the logger above.
    logger.setLevel(max(number, 1))
    for handler in handlers:
        logger.addHandler(handler)
    return logger


def get_logger(name: str | None = None) -> logging.Logger:
    """Return the logger of that name, as `logging.getLogger` does.

    Args:
        name: Usually ``__name__``. Default: the root logger.

    Returns:
        The logger.

    Example:
        >>> get_logger("training").name
        'training'
    """
    return logging.getLogger(name)


def remove_handlers(logger: logging.Logger) -> None:
    """Close and take away what `setup_logging` attached to a logger, and nothing else.

    Args:
        logger: The logger.

    Example:
        >>> logger = setup_logging(logger_name="example")
        >>> remove_handlers(logger)
        >>> logger.handlers
        []
    """
    for handler in [handler for handler in logger.handlers if isinstance(handler, _ConsoleHandler | _FileHandler)]:
        logger.removeHandler(handler)
        handler.close()


def _level_number(level: int | str) -> int:
    names = logging.getLevelNamesMapping()
    if isinstance(level, str) and level.strip().upper() in names:
        return names[level.strip().upper()]
    if isinstance(level, int) and not isinstance(level, bool) and level >= 0:
        return level
    raise ValueError(f"level: received {level!r}; expected a number >= 0 or one of {', '.join(names)}")


def _log_path(log_file: str | os.PathLike[str] | None, log_dir: str | os.PathLike[str] | None) -> Path | None:
    if log_dir is None:
        return None if log_file is None else Path(log_file).absolute()
    folder = Path(log_dir).absolute()
    path = folder / (DEFAULT_FILE if log_file is None else log_file)
    if not path.is_relative_to(folder):
        raise ValueError(f"log_file: received {log_file}; expected a file in log_dir {log_dir}, or no log_dir")
    return path


def _first_time(record: logging.LogRecord, destination: str) -> bool:
    """Whether a record has not been written there yet: loggers hand their records on to those above them."""
    written: set[str] = record.__dict__.setdefault("_written_to", set())
    if destination in written:
        return False
    written.add(destination)
    return True


class _ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    def emit(self, record: logging.LogRecord) -> None:
        if _first_time(record, "console"):
            # Looked up anew: notebooks and test runners exchange it.
            self.stream = sys.stderr
            super().emit(record)


class _FileHandler(RotatingFileHandler):
    def __init__(self, path: Path, max_file_size: int, backup_count: int) -> None:
        super().__init__(path, maxBytes=max_file_size, backupCount=backup_count, encoding="utf-8", delay=True)

    def emit(self, record: logging.LogRecord) -> None:
        if _first_time(record, self.baseFilename):
            super().emit(record)


class _ConsoleFormatter(logging.Formatter):
    def __init__(self, line: str, date: str, use_colors: bool) -> None:
        super().__init__(line, date)
        self._use_colors = use_colors

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        if not self._use_colors or os.environ.get("NO_COLOR") or not sys.stderr.isatty():
            return text
        color = _COLORS.get(record.levelno, "0")
        return text.replace(record.levelname, f"\033[{color}m{record.levelname}\033[0m", 1)
