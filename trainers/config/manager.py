"""The configuration manager: finds, loads, composes and saves configuration files."""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.config.creation import create_experiment_config, examine, report, to_dict
from trainers.config.environment import escaped, resolve
from trainers.config.errors import ConfigurationError, MissingConfiguration, ValidationError
from trainers.config.files import SUFFIXES, read_tree, write_atomically, written
from trainers.config.keys import assign, canonical_names
from trainers.config.merging import merged
from trainers.config.plain import plain, plain_problems
from trainers.config.schema import ExperimentConfig

# What a folder is like in which nothing can be made.
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class ConfigurationManager:
    """Loads, composes and saves configurations.

    Dicts that are given are never changed, and dicts that are returned belong to the caller.

    Args:
        project_root: Root of the project.
        config_dir: Folder of its configuration files, by default ``configs`` below the root; created if need be,
            unless the project can only be read.

    Attributes:
        project_root: As an absolute path.
        config_dir: Likewise.

    Raises:
        ConfigurationError: `config_dir` is something else than a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manager = ConfigurationManager(folder)
        ...     manager.save_config({"seed": 1}, manager.config_dir / "seeded.yaml")
        ...     manager.load_config("seeded", validate=False)
        {'seed': 1}
    """

    def __init__(self, project_root: str | Path, config_dir: str | Path | None = None) -> None:
        self.project_root = Path(project_root).absolute()
        self.config_dir = self.project_root / "configs" if config_dir is None else Path(config_dir).absolute()
        try:
            self.config_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            # Who writes nothing there needs no such folder.
            if error.errno not in _READ_ONLY:
                raise ConfigurationError(
                    f"config_dir: the folder {self.config_dir} cannot be made ({error}). Choose another one."
                ) from error
        # What each file held when it was parsed, and what came of it.
        self._cache: dict[Path, tuple[bytes, dict[str, Any]]] = {}

    def load_config(self, config_path: str | Path, validate: bool = True, use_cache: bool = True) -> dict[str, Any]:
        """Return the content of a configuration file, with interpolations resolved.

        Args:
            config_path: An absolute path, or one below the working directory, the project's root or `config_dir`;
                in `config_dir` the suffix may be left out.
            validate: Whether to check everything, log warnings and return canonical names and the types of the
                schema; otherwise the file's own keys and values are returned.
            use_cache: Whether a file that has not changed may be taken from memory; the environment is read anew.

        Returns:
            What the file sets, without the defaults of what it does not set.

        Raises:
            MissingConfiguration: There is no such file; it is also a ``FileNotFoundError``.
            UnsupportedFormat: The suffix is neither of YAML nor of JSON; it is also a ``ValueError``.
            ConfigurationError: The file is broken; file and line are named.
            ValidationError: Its content is invalid; all problems are listed.
        """
        path = self._find(config_path)
        content = resolve(self._tree_of(path, use_cache), str(path))
        if not validate:
            _require_plain(content, str(path))
            return content
        examined = examine(content)
        report(examined, str(path))
        return examined.content

    def save_config(
        self,
        config: Mapping[str, Any] | ExperimentConfig,
        output_path: str | Path,
        format: str = "yaml",
    ) -> None:
        """Write a configuration under canonical names, so that it loads equal; a crash leaves the old file or the new.

        Args:
            config: A configuration, or a dict under any spelling, whose strings are literal.
            output_path: The file, whatever its suffix; folders above it are created.
            format: "yaml", "yml" or "json".

        Raises:
            UnsupportedFormat: Another format; nothing is written.
            ValidationError: Something could not be read back equal; nothing is written.
        """
        if isinstance(config, ExperimentConfig):
            content = to_dict(config)
        else:
            content, problems = canonical_names(_plain_dict(config, "config"))
            if problems:
                raise ValidationError(problems)
        _require_plain(content, None)
        write_atomically(Path(output_path), written(escaped(content), format))

    def compose_configs(
        self,
        base_config: str | Path | Mapping[str, Any],
        overrides: Sequence[str | Path | Mapping[str, Any]] | None = None,
        parameter_overrides: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return a base with overrides merged into it: dicts deep, lists and values replaced, later wins.

        Interpolations in files are resolved after merging, so they see what overrides have set; strings in dicts are
        literal. The result is not validated: `create_experiment_config` does that.

        Args:
            base_config: A file or a dict.
            overrides: Files or dicts, which may set as little as they like.
            parameter_overrides: Dotted keys to values. A dict for a section is merged into it; any other value
                replaces what was there.

        Returns:
            The merged configuration under canonical names.

        Raises:
            ConfigurationError: A key of ``parameter_overrides`` is not in the schema or leads through a value, or an
                argument has the wrong type; otherwise as `load_config`.
        """
        is_list = isinstance(overrides, Iterable) and not isinstance(overrides, (str, Mapping))
        if overrides is not None and not is_list:
            raise ConfigurationError(f"overrides: received {overrides!r}; expected a list of files or dicts.")
        tree = self._part(base_config, "base_config")
        for index, override in enumerate(overrides or []):
            tree = merged(tree, self._part(override, f"overrides[{index}]"))
        for key, value in _plain_dict(parameter_overrides or {}, "parameter_overrides").items():
            assign(tree, key, escaped(value))
        content, problems = canonical_names(resolve(tree))
        problems += plain_problems(content, "")
        if problems:
            raise ValidationError(problems)
        return content

    def create_experiment_config(self, config: Mapping[str, Any]) -> ExperimentConfig:
        """Return the configuration that a dict describes; the same as `trainers.config.create_experiment_config`.

        Args:
            config: Complete but for defaults, under any spelling.

        Returns:
            The configuration.

        Raises:
            ValidationError: Its content is invalid; all problems are listed.
        """
        return create_experiment_config(config)

    def _part(self, part: str | Path | Mapping[str, Any], argument: str) -> dict[str, Any]:
        """Content of a file, or a dict as a file would hold it; the caller may change it."""
        if isinstance(part, (str, Path)):
            return self._tree_of(self._find(part), use_cache=True)
        tree: dict[str, Any] = escaped(_plain_dict(part, argument))
        return tree

    def _tree_of(self, path: Path, use_cache: bool) -> dict[str, Any]:
        content = path.read_bytes()
        known, tree = self._cache.get(path, (b"", {}))
        if not use_cache or known != content:
            tree = read_tree(path, content)
            self._cache[path] = (content, tree)
        return copy.deepcopy(tree)

    def _find(self, config_path: str | Path) -> Path:
        asked = Path(config_path).expanduser()
        places = [Path.cwd() / asked, self.project_root / asked, self.config_dir / asked]
        # A name may contain dots, so a suffix is added to it, never exchanged.
        places += [self.config_dir / f"{asked}{suffix}" for suffix in SUFFIXES]
        if asked.is_absolute():
            places = [asked]
        for place in places:
            if place.is_file():
                return place.resolve()
        listed = "\n  - ".join(["", *dict.fromkeys(map(str, places))])
        raise MissingConfiguration(f"No configuration file {str(config_path)!r}; looked for{listed}")


def _plain_dict(value: Any, argument: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{argument}: received {type(value).__name__}; expected a dict.")
    content: dict[str, Any] = plain(value)
    return content


def _require_plain(content: dict[str, Any], source: str | None) -> None:
    problems = plain_problems(content, "")
    if problems:
        raise ValidationError(problems, source)
