"""One grid of parameters: every combination of the values given for each key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainers.config.errors import ValidationError
from trainers.config.plain import plain, plain_problems


@dataclass
class ParameterGrid:
    """Values to try for each of some configuration keys.

    Keys are not compared with the schema here; `ParameterGridSearch` does that before the first experiment.

    Args:
        name: What to call the grid.
        description: What it is for.

    Attributes:
        parameters: The values of each key, in the order in which the keys were added.

    Example:
        >>> grid = ParameterGrid("sizes")
        >>> grid.add_parameter("model.hidden_size", [128, 256])
        >>> grid.add_parameter("seed", range(2))
        >>> grid.get_parameter_count()
        4
        >>> list(grid.generate_permutations())[1]
        {'model.hidden_size': 128, 'seed': 1}
    """

    name: str
    description: str = ""
    parameters: dict[str, list[Any]] = field(default_factory=dict, init=False)

    def add_parameter(self, key: str, values: Any) -> None:
        """Add a key with its values; a key that is there already gets these instead.

        Args:
            key: A configuration key, with dots between its parts: ``"model.hidden_size"``.
            values: A list, tuple, range, numpy array or other ordered collection. Kept as a list of plain values.

        Raises:
            TypeError: The key is no text, or the values are a text, a dict, a set or no collection at all.
            ValueError: There is no value, or one that no configuration file can hold (`ValidationError`).

        Example:
            >>> grid = ParameterGrid("rates")
            >>> grid.add_parameter("optimizer.lr", (0.1, 0.01))
            >>> grid.parameters
            {'optimizer.lr': [0.1, 0.01]}
        """
        if not isinstance(key, str):
            raise TypeError(f"grid {self.name!r}: received the key {key!r}; expected text such as 'model.hidden_size'")
        self.parameters[key] = _plain_list(values, key, self.name)

    def add_nested_parameter(self, key_path: str, values: Any) -> None:
        """Add a key with dots between its parts; the same as `add_parameter`.

        Args:
            key_path: As ``key`` there.
            values: As there.

        Raises:
            TypeError: As there.
            ValueError: As there.
        """
        self.add_parameter(key_path, values)

    def get_parameter_count(self) -> int:
        """Return the number of combinations; 0 for a grid without keys."""
        return math.prod(len(values) for values in self.parameters.values()) if self.parameters else 0

    def generate_permutations(self) -> Iterator[dict[str, Any]]:
        """Yield every combination as a dict of its own, the last key changing fastest.

        Raises:
            TypeError: Values that were put into `parameters` directly are refused as by `add_parameter`.
            ValueError: Likewise.
        """
        if not self.parameters:
            return
        lists = [_plain_list(values, key, self.name) for key, values in self.parameters.items()]
        for values in itertools.product(*lists):
            yield dict(zip(self.parameters, plain(values), strict=True))


def _plain_list(values: Any, key: str, grid: str) -> list[Any]:
    where = f"grid {grid!r}, key {key!r}"
    if hasattr(values, "tolist"):
        values = values.tolist()
    # Iterating these would give characters, keys or another order in every process.
    if isinstance(values, str | bytes | bytearray | Mapping | set | frozenset) or not hasattr(values, "__iter__"):
        raise TypeError(f"{where}: received {values!r}; expected a list of values, such as [{values!r}]")
    copies = plain(list(values))
    if not copies:
        raise ValueError(f"{where}: received no value; expected at least one")
    problems = plain_problems(copies, key)
    if problems:
        raise ValidationError(problems, f"grid {grid!r}")
    return list(copies)
