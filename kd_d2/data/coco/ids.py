"""Ids of images and categories: whole numbers, however they are written."""

from __future__ import annotations

import re
from typing import Any

from ...errors import UserError
from .repairs import Repairs

WRITTEN_NUMBER = re.compile(r"\s*([+-]?\d{1,18})(\.0*)?\s*")

Key = int | str


def whole_number(value: Any) -> int | None:
    """12 for 12, 12.0, "12" and "12.0"; None for what is no whole number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    match = WRITTEN_NUMBER.fullmatch(value) if isinstance(value, str) else None
    return int(match[1]) if match else None


def key_of(value: Any) -> Key | None:
    """What an id is looked up by: a number where it is one, else its text; None for anything else."""
    number = whole_number(value)
    return number if number is not None else value if isinstance(value, str) else None


class Ids:
    """The ids of the images or the categories of a file. Where one is text, all are numbered from 1.

    Args:
        path: the annotation file, for messages.
        kind: "images" or "categories".
        entries: dictionaries; not changed.
        repairs: what is repaired is added.

    Raises:
        UserError: an entry has no id, or two have the same.
    """

    def __init__(self, path: str, kind: str, entries: list[dict[str, Any]], repairs: Repairs):
        self.number_of: dict[Key, int] = {}
        for entry in entries:
            key = key_of(entry.get("id"))
            if key is None:
                raise UserError(
                    f"{path}: an entry of {kind} has no usable id: {str(entry)[:120]}; each needs a number or a name of its own."
                )
            if key in self.number_of:
                raise UserError(
                    f"{path}: the id {key!r} occurs more than once in its {kind}; annotations refer to it, so give each its own."
                )
            if isinstance(key, int) and type(entry["id"]) is not int:
                repairs.add(f"ids of {kind} read as whole numbers", repr(entry["id"]))
            self.number_of[key] = key if isinstance(key, int) else 0
        text = [key for key in self.number_of if isinstance(key, str)]
        if text:
            repairs.add(f"{kind} numbered from 1, since ids are text", repr(text[0]))
            self.number_of = {key: number for number, key in enumerate(self.number_of, 1)}

    def find(self, value: Any) -> int | None:
        """The number of the entry that a reference means; None if there is none."""
        return self.number_of.get(key_of(value))
