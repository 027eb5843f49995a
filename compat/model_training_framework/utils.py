"""The documented names of `model_training_framework.utils`."""

from trainers.utils import (
    Error,
    Result,
    Success,
    ensure_directory_exists,
    find_structure_problems,
    get_logger,
    get_project_root,
    setup_logging,
    validate_project_structure,
)

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
