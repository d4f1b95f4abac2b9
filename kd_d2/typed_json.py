"""Conversion of JSON trees into typed Python objects."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import UserError

LARGEST = 10**300
_NAMES = {
    dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"
}  # fmt: skip


def from_tree(kind: Any, tree: Any, path: str, place: str = "the file") -> Any:
    """Convert a JSON tree to a dataclass, dict[str, ...], list[...], str, int, float, bool or None.

    The type may also be a union of the last five, or of one of the others and None.

    Args:
        kind: target type.
        tree: result of json.load; dataclass fields with defaults may be missing.
        path, place: file and location of the tree in it, for messages.

    Raises:
        UserError: the tree does not match the type.
    """
    if is_dataclass(kind):
        hints, present = get_type_hints(kind), _checked(dict, tree, path, place)
        optional = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
        return kind(**members({n: h for n, h in hints.items() if n in present or n not in optional}, tree, path, place))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict:
        entries = _checked(dict, tree, path, place)
        return {name: from_tree(arguments[1], value, path, repr(name)) for name, value in entries.items()}
    if origin is tuple and len(_checked(list, tree, path, place)) != len(arguments):
        raise UserError(f"{path}: {place} has {len(tree)} entries, not {len(arguments)}.")
    if origin in (list, tuple):
        return [
            from_tree(arguments[0], entry, path, f"an entry of {place}") for entry in _checked(list, tree, path, place)
        ]
    if origin not in (Union, types.UnionType):
        return _checked(kind, tree, path, place)
    if all(argument in _NAMES for argument in arguments):
        return _checked(arguments, tree, path, place)
    (other,) = (argument for argument in arguments if argument is not type(None))
    return None if tree is None else from_tree(other, tree, path, place)


def members(hints: dict[str, Any], tree: Any, path: str, place: str = "the file") -> dict[str, Any]:
    """Convert the members of a JSON object that `hints` names to the types given there; see `from_tree`."""
    missing = sorted(hints.keys() - _checked(dict, tree, path, place).keys())
    if missing:
        raise UserError(f"{path}: {place} has no {missing[0]!r}.")
    return {name: from_tree(hint, tree[name], path, repr(name)) for name, hint in hints.items()}


def _checked(kinds: type | tuple[type, ...], tree: Any, path: str, place: str) -> Any:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(tree, allowed) or (isinstance(tree, bool) and bool not in kinds):
        names = " or ".join(_NAMES[kind] for kind in kinds)
        raise UserError(f"{path}: {place} is {str(tree)[:60]!r}, not {names}.")
    if isinstance(tree, int) and int not in kinds and abs(tree) > LARGEST:
        raise UserError(f"{path}: {place} is too large a number.")
    return tree
