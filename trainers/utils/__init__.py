"""Logging, paths and results: what the framework and its users share."""

from trainers.utils.logging import get_logger, setup_logging
from trainers.utils.paths import (
    ensure_directory_exists,
    find_structure_problems,
    get_project_root,
    validate_project_structure,
)
from trainers.utils.result import Error, Result, Success

__all__ = [
    "Error",
    "Result",
    "Success",
    "ensure_directory_exists",
    "find_structure_problems",
    "get_logger",
    "get_project_root",
    "setup_logging",
    "validate_project_structure",
]
