"""Settings of an MMDetection config, of which none may be overlooked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

REQUIRED = object()
WITHOUT_EFFECT = ("init_cfg", "pretrained", "test_cfg", "train_cfg", "with_cp", "zero_init_residual")
"""Entries that do not change what a trained detector does; the one `test_cfg` that does, the model's, is always read."""


class Settings:
    """A dict of a config. Every entry must be read, or raises an error in `check_all_read`: none changes the detector silently.

    Args:
        values: the dict.
        path: its place in the config, such as "model.neck".
    """

    def __init__(self, values: Mapping[str, Any], path: str):
        self._values = values
        self._path = path
        self._unread = dict.fromkeys(name for name in values if name not in WITHOUT_EFFECT and name[:5] != "loss_")
        self._nodes: list[Settings] = []

    def read(self, name: str, default: Any = REQUIRED) -> Any:
        """Return a value, or the default if there is none.

        Raises:
            UserError: there is neither.
        """
        self._unread.pop(name, None)
        value = self._values.get(name, default)
        if value is REQUIRED:
            raise UserError(f"The MMDetection config has no {self._path}.{name}.")
        return value

    def numbers(self, name: str, default: Sequence[float] | None = None) -> list[float]:
        """Return a list of numbers, or the default if there is none.

        Raises:
            UserError: there is neither, or the value is something else.
        """
        values = self.read(name, REQUIRED if default is None else default)
        if not isinstance(values, list | tuple) or not all(isinstance(value, int | float) for value in values):
            raise self._invalid(name, values, "a list of numbers")
        return [float(value) for value in values]

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number, or the default if there is none.

        Raises:
            UserError: there is neither, or the value is something else.
        """
        value = self.read(name, REQUIRED if default is None else default)
        if not isinstance(value, int | float):
            raise self._invalid(name, value, "a number")
        return float(value)

    def count(self, name: str, default: int | None = None) -> int:
        """Return a number of things, or the default if there is none.

        Raises:
            UserError: there is neither, or the value is something else.
        """
        value = self.read(name, REQUIRED if default is None else default)
        if type(value) is not int or value < 1:
            raise self._invalid(name, value, "a positive integer")
        return value

    def kind(self) -> str:
        """Return the name of the class in `type`, without a scope or module."""
        return str(self.read("type")).rpartition(".")[2]

    def choose(self, name: str, choices: Mapping[Any, Any], default: Any = REQUIRED) -> Any:
        """Return what a value, or the default, is mapped to.

        Raises:
            UserError: the value is not one of the choices.
        """
        value = self.kind() if name == "type" else self.read(name, default)
        for choice, meaning in choices.items():
            if _plain(value) == choice:
                return meaning
        raise self._refused(name, value, list(choices))

    def only(self, **values: Any) -> None:
        """Check that entries have these values, or do not exist.

        Raises:
            UserError: one has another value.
        """
        for name, expected in values.items():
            value = self.kind() if name == "type" else self.read(name, expected)
            if _plain(value) != _plain(expected):
                raise self._refused(name, value, [expected])

    def _refused(self, name: str, value: Any, supported: list[Any]) -> UserError:
        return UserError(
            f"{self._path}.{name} is {value!r} in the MMDetection config; only {' or '.join(map(repr, supported))} can be imported."
        )

    def _invalid(self, name: str, value: Any, what: str) -> UserError:
        return UserError(f"{self._path}.{name} is {value!r} in the MMDetection config; it must be {what}.")

    def node(self, name: str, default: Any = REQUIRED) -> Settings:
        """Return the settings in an entry."""
        return self._node(name, self.read(name, default))

    def nodes(self, name: str, count: int) -> list[Settings]:
        """Return the settings in a list of dicts; one dict stands for `count` equal ones."""
        values = self.read(name)
        values = [values] * count if isinstance(values, Mapping) else values
        if not isinstance(values, Sequence) or len(values) != count:
            raise UserError(f"{self._path}.{name} must have {count} entries in the MMDetection config.")
        return [self._node(f"{name}[{index}]", value) for index, value in enumerate(values)]

    def _node(self, name: str, value: Any) -> Settings:
        if not isinstance(value, Mapping):
            raise self._invalid(name, value, "a dict")
        self._nodes.append(Settings(value, f"{self._path}.{name}"))
        return self._nodes[-1]

    def check_all_read(self) -> None:
        """Raise a UserError if an entry here, or in a node, was not read."""
        for name in self._unread:
            if self._values[name] is not None:
                raise UserError(
                    f"{self._path}.{name} is {self._values[name]!r} in the MMDetection config; Detectron2 has no such setting, so the "
                    "detector cannot be imported."
                )
        for node in self._nodes:
            node.check_all_read()


def _plain(value: Any) -> Any:
    """Convert lists to tuples."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
