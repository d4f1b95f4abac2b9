"""Normalization of image and category ids to integers."""

from __future__ import annotations

import re
from typing import Any

from ...errors import UserError
from .repairs import Repairs

LARGEST_ID = 2**53  # the evaluators store ids as floating-point numbers
WRITTEN_NUMBER = re.compile(r"\s*([+-]?\d{1,18})(\.0*)?\s*")

Key = int | str


def whole_number(value: Any) -> int | None:
    """Return 12 for 12, 12.0, "12" and "12.0"; None if the value is not a whole number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    match = WRITTEN_NUMBER.fullmatch(value) if isinstance(value, str) else None
    return int(match[1]) if match else None


def key_of(value: Any) -> Key | None:
    """Return the lookup key of an id: an integer if it is a whole number, else its text, or None for other types."""
    number = whole_number(value)
    return number if number is not None else value if isinstance(value, str) else None


class Ids:
    """Integer ids of the images or categories of a file. If any id is text or too large for the evaluators, all entries
    are numbered from 1.

    Args:
        path: annotation file, for messages.
        kind: "images" or "categories".
        entries: dictionaries of the file; not modified.
        repairs: record to which repairs are added.

    Raises:
        UserError: an entry has no usable id, or two entries have the same id.
    """

    def __init__(self, path: str, kind: str, entries: list[dict[str, Any]], repairs: Repairs):
        self.number_of: dict[Key, int] = {}
        ids = [entry.get("id") for entry in entries]
        self._is_text = all(isinstance(value, str) for value in ids) and len({*map(key_of, ids)}) < len({*ids})
        for entry in entries:
            key = self._key(entry.get("id"))
            if key is None:
                raise UserError(
                    f"{path}: an entry of {kind} has no usable id: {str(entry)[:120]}; each needs a unique number or name."
                )
            if key in self.number_of:
                raise UserError(
                    f"{path}: the id {key!r} occurs more than once in its {kind}; annotations refer to it, so ids must be unique."
                )
            if isinstance(key, int) and type(entry["id"]) is not int:
                repairs.add(f"ids of {kind} read as whole numbers", repr(entry["id"]))
            self.number_of[key] = key if isinstance(key, int) else 0
        text = [key for key in self.number_of if isinstance(key, str)]
        large = [key for key in self.number_of if isinstance(key, int) and abs(key) >= LARGEST_ID]
        if text or large:
            reason = "text" if text else "too large"
            repairs.add(f"{kind} numbered from 1 because ids are {reason}", repr((text or large)[0]))
            keys = self.number_of if text else sorted(self.number_of)
            self.number_of = {key: number for number, key in enumerate(keys, 1)}

    def find(self, value: Any) -> int | None:
        """Return the integer id of the entry that a reference refers to, or None if there is none."""
        return self.number_of.get(self._key(value))

    def merge(self, value: Any, other: Any) -> None:
        """Let references to an entry refer to another one."""
        self.number_of[self._key(value)] = self.number_of[self._key(other)]

    def _key(self, value: Any) -> Key | None:
        """Return the key of an id, which is its text if the ids are texts such as "001" and "01" for equal numbers."""
        return value if self._is_text and isinstance(value, str) else key_of(value)
