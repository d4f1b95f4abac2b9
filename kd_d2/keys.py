"""Config keys declared as dataclasses with type, range, default and description, from which yacs nodes are built.

    @dataclass(frozen=True)
    class Config(Keys):
        temperature: Annotated[float, Above(0), "Temperature of the softmax."] = 1.0
        mask: Annotated[Literal["random", "none"], "Which positions are hidden."] = "random"

declares a node with the keys TEMPERATURE and MASK. The type of a key is bool, int, float, str, list, a Literal, a tuple
of one of these, or one of these or None. Conditions on the value and one description follow in any order.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import numbers
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from fvcore.common.config import CfgNode

from .errors import UserError, is_finite_number

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", list: "a list"}
COUNTS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Condition:
    """A condition on a value. `words` completes "it must be ..."; `holds` tests a value of the right type."""

    words: str
    holds: Callable[[Any], bool] = dataclasses.field(compare=False)


class AtLeast(Condition):
    """The number, or each number of a tuple, is at least `bound`."""

    def __init__(self, bound: float):
        super().__init__(f"at least {bound}", lambda value: value >= bound)


class Above(Condition):
    """The number, or each number of a tuple, is greater than `bound`."""

    def __init__(self, bound: float):
        super().__init__(f"above {bound}", lambda value: value > bound)


class AtMost(Condition):
    """The number, or each number of a tuple, is at most `bound`."""

    def __init__(self, bound: float):
        super().__init__(f"at most {bound}", lambda value: value <= bound)


class Below(Condition):
    """The number, or each number of a tuple, is less than `bound`."""

    def __init__(self, bound: float):
        super().__init__(f"below {bound}", lambda value: value < bound)


class OneOf(Condition):
    """The value is one of `choices`: a Literal with choices known only at run time, such as the keys of a dict."""

    def __init__(self, *choices: object):
        super().__init__(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


@dataclass(frozen=True)
class Key:
    """One config key.

    Attributes:
        field: name of the dataclass's field.
        kind: bool, int, float, str or list (of the items of a tuple); None for any value that the conditions allow.
        optional: whether the value may be None.
        length: number of items of a tuple, 0 for any number; None for a single value.
        conditions: conditions that the value, or each item of a tuple, must satisfy.
        default: the default value.
        description: description of the key; "" if there is none.
    """

    field: str
    kind: type | None
    optional: bool
    length: int | None
    conditions: tuple[Condition, ...]
    default: Any
    description: str

    @property
    def name(self) -> str:
        """Name in uppercase, as in a config file."""
        return self.field.upper()

    @property
    def words(self) -> str:
        """Allowed values, as the end of the sentence "it must be ..."."""
        return f"None or {self._words}" if self.optional else self._words

    @property
    def _words(self) -> str:
        words = [condition.words for condition in self.conditions]
        if self.kind is None:
            return words[0] if self.length is None else f"a list whose entries are {words[0]}"
        if len(words) == 2:
            words = [f"{words[0].replace('at least', 'from')} {'to' if 'at least' in words[0] else 'and'} {words[1]}"]
        if self.conditions and not isinstance(self.conditions[0], AtLeast | Above | AtMost | Below):
            return words[0]
        kind = KINDS[self.kind]
        if self.length is not None:
            several = kind.removeprefix("a ") + "s"
            kind = f"{COUNTS.get(self.length, self.length)} {several}" if self.length else f"a list of {several}"
        return " ".join([kind, *words])

    def read(self, value: Any, full_name: str) -> Any:
        """Return the value, with a list converted to a tuple; raise a UserError that names the key if it is invalid."""
        if not self.accepts(value):
            raise UserError(f"{full_name} is {value!r}; it must be {self.words}.")
        return tuple(value) if self.length is not None and value is not None else value

    def accepts(self, value: Any) -> bool:
        """Return whether the value has the right type and satisfies the conditions."""
        if value is None and self.optional:
            return True
        if self.length is None:
            return self._fits(value)
        return isinstance(value, list | tuple) and self.length in (0, len(value)) and all(map(self._fits, value))

    def _fits(self, item: Any) -> bool:
        if self.kind is float:
            is_right = is_finite_number(item)
        elif self.kind is list:
            is_right = isinstance(item, list | tuple)
        else:
            is_right = self.kind is None or type(item) is self.kind
        return is_right and all(condition.holds(item) for condition in self.conditions)


class Keys:
    """Base class of the dataclasses that declare the keys of a config node."""

    @classmethod
    def add_to(cls, node: CfgNode) -> None:
        """Add the keys, with their defaults, to a config node."""
        for key in keys_of(cls):
            node[key.name] = copy.copy(key.default)

    @classmethod
    def read(cls, node: CfgNode, name: str) -> Self:
        """Read and validate a node.

        Args:
            node: node with all keys of the class.
            name: name of the node in messages, such as "MODEL.KD.ICD".

        Raises:
            UserError: a value has the wrong type, is out of range or not one of the choices, or conflicts with another;
                the message names the key.
        """
        keys = keys_of(cls)
        config = cls(**{key.field: key.read(node[key.name], f"{name}.{key.name}") for key in keys})
        config.check(name)
        return config

    def validate(self, name: str) -> None:
        """Raise a UserError like `read` for values that were passed to the constructor.

        Sequences of any type count as lists, and numbers of NumPy and PyTorch as Python's.

        Args:
            name: name of the object in messages, such as "ICD.Config".
        """
        for key in keys_of(type(self)):
            key.read(_as_in_yaml(getattr(self, key.field)), f"{name}.{key.field}")
        self.check(name)

    def check(self, name: str) -> None:
        """Raise a UserError if values conflict. `name` is that of the node in messages, such as "MODEL.KD.ICD"."""


def _as_in_yaml(value: Any) -> Any:
    """Convert arrays, other numbers than Python's, and other sequences than strings to what a config file can hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_in_yaml(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, int):
        return float(value)
    return value


@functools.cache
def keys_of(cls: type[Keys]) -> tuple[Key, ...]:
    """Return the keys that a class declares and inherits, in order.

    Raises:
        TypeError: the class is not decorated as a dataclass, a key has an unsupported type, or two have the same name.
    """
    if "__dataclass_fields__" not in vars(cls):
        raise TypeError(f"{cls.__qualname__} lacks the decorator @dataclass(frozen=True)")
    hints = get_type_hints(cls, include_extras=True)
    keys = tuple(_key(cls, field, hints[field.name]) for field in dataclasses.fields(cls))
    for key in keys:
        same = [other.field for other in keys if other.name == key.name]
        if len(same) > 1:
            raise TypeError(f"{cls.__qualname__} has {' and '.join(same)}, which are the same key {key.name}")
    return keys


def _key(cls: type[Keys], field: dataclasses.Field, hint: Any) -> Key:
    extras: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
    conditions = [extra for extra in extras if isinstance(extra, Condition)]
    descriptions = [extra for extra in extras if isinstance(extra, str)]
    optional, length = False, None
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        optional, hint = len(kinds) < len(get_args(hint)), kinds[0] if len(kinds) == 1 else hint
    if get_origin(hint) is tuple:
        items = get_args(hint)
        length = 0 if items[-1] is Ellipsis else len(items)
        hint = items[0]
    if get_origin(hint) is Literal:
        conditions, hint = [OneOf(*get_args(hint)), *conditions], None
    elif hint not in KINDS:
        raise TypeError(
            f"{cls.__qualname__}.{field.name} is of type {hint}; a config key is a bool, int, float, str, list, Literal, or a tuple of these"
        )
    has_factory = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if has_factory else field.default
    if default is dataclasses.MISSING:
        raise TypeError(f"{cls.__qualname__}.{field.name} has no default")
    if hint is float and type(default) is int:
        default = float(default)  # by its type, a config file's numbers are converted
    description = descriptions[-1] if descriptions else ""
    return Key(field.name, hint, optional, length, tuple(conditions), default, description)
