"""Lookup of image files whose names in the annotations differ from those on disk."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from urllib.parse import unquote

from ...errors import UserError
from ...image_files import is_image_name

UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}[-_](?=.)")  # Label Studio's


class ImageFinder:
    """Finds images in a folder by names that may differ in folders, slashes, upload prefixes, suffix or letter case.

    Args:
        folder: folder of the images.
        files: candidates, relative to the folder; None for all images.
    """

    def __init__(self, folder: str, files: Iterable[str] | None = None):
        self.folder = folder
        self._given = None if files is None else frozenset(files)

    def find(self, name: str) -> str | None:
        """Return the path of an image relative to the folder, or None if it is not found.

        Raises:
            UserError: several files match.
        """
        return self.only(name, self.candidates(name))

    def only(self, name: str, found: list[str]) -> str | None:
        """Return the only image among those that match a name, or None if there is none.

        Raises:
            UserError: there are several.
        """
        if len(found) > 1:
            raise UserError(
                f"The image {name} may be {found[0]} or {found[1]} in {self.folder}: use the right one as its file name, or remove the "
                "other."
            )
        return found[0] if found else None

    def candidates(self, name: str) -> list[str]:
        """Return the paths, relative to the folder, of the images that match a name best."""
        for spelling in (name, *_spellings(name)):
            if self._has(spelling):
                return [spelling]
        plain = unquote(name.replace("\\", "/")).partition("?")[0]
        for index, form in zip(self._indices, FORMS):
            found = index.get(form(plain), [])
            if len(found) > 1:  # prefer the file whose folder has the same name
                parent = os.path.dirname(plain).rpartition("/")[2].lower()
                found = [f for f in found if os.path.basename(os.path.dirname(f)).lower() == parent] or found
            if found:
                return found
        return []

    def _has(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.folder, name)) if self._given is None else name in self._given

    @cached_property
    def files(self) -> list[str]:
        """All images of the folder tree, relative to the folder."""
        if self._given is not None:
            return sorted(self._given)
        return sorted(
            os.path.relpath(os.path.join(parent, name), self.folder)
            for parent, _, names in os.walk(self.folder)
            for name in names
            if is_image_name(name)
        )

    @cached_property
    def _indices(self) -> list[dict[str, list[str]]]:
        indices = []
        for form in FORMS:
            index = defaultdict(list)
            for file in self.files:
                index[form(file)].append(file)
            indices.append(index)
        return indices


def _spellings(name: str) -> Iterator[str]:
    """Yield variants of a name: with forward slashes, without query, URL-decoded, and without leading folders."""
    path = name.replace("\\", "/")
    query = re.search(r"[?&]d=([^&]+)", path)  # Label Studio's local files
    for form in dict.fromkeys([*([query[1]] if query else []), path, path.partition("?")[0]]):
        for plain in dict.fromkeys([form, unquote(form)]):
            parts = [part for part in plain.split("/") if part not in ("", ".")]
            yield from ("/".join(parts[start:]) for start in range(len(parts)) if ".." not in parts[start:])


def _base(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.basename(name)).casefold().replace(".jpeg", ".jpg")


def _without_prefix(name: str) -> str:
    return UPLOAD_PREFIX.sub("", _base(name))


def _stem(name: str) -> str:
    return os.path.splitext(_without_prefix(name))[0]


FORMS: tuple[Callable[[str], str], ...] = (_base, _without_prefix, _stem)
"""Normalizations by which names are compared, strictest first."""
