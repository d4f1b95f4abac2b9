"""Finding the image that a file name means, where folder and annotations spell it in different ways."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from urllib.parse import unquote

from PIL import Image

from ...errors import UserError
from ..images import IMAGE_FORMATS, READING_ERRORS, open_image

UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}[-_](?=.)")  # Label Studio's
SUFFIXES = frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in IMAGE_FORMATS)


def is_image_name(name: str) -> bool:
    """Whether a file has the suffix of an image, and is not hidden."""
    base = os.path.basename(name)
    return os.path.splitext(base)[1].lower() in SUFFIXES and not base.startswith(".")


class ImageFinder:
    """Finds images of a folder by names that may have other folders, slashes, upload prefixes or letter case.

    Args:
        folder: of the images.
        files: the only ones that may be found, relative to the folder; None for all.
    """

    def __init__(self, folder: str, files: Iterable[str] | None = None):
        self.folder = folder
        self._given = None if files is None else frozenset(files)

    def find(self, name: str) -> str | None:
        """The path of an image relative to the folder; None if there is none.

        Raises:
            UserError: several files may be meant.
        """
        for spelling in (name, *_spellings(name)):
            if self._has(spelling):
                return spelling
        plain = unquote(name.replace("\\", "/")).partition("?")[0]
        for index, form in zip(self._indices, FORMS):
            found = index.get(form(plain), [])
            if len(found) > 1:  # of files of one name the one in the same folder
                parent = os.path.dirname(plain).rpartition("/")[2].lower()
                found = [f for f in found if os.path.basename(os.path.dirname(f)).lower() == parent] or found
            if len(found) > 1:
                raise UserError(
                    f"The image {name} may be {found[0]} or {found[1]} in {self.folder}: write the one that is meant as its file name, or remove the "
                    "other."
                )
            if found:
                return found[0]
        return None

    def _has(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.folder, name)) if self._given is None else name in self._given

    @cached_property
    def files(self) -> list[str]:
        """All images of the folder and the folders in it, relative to it."""
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
    """The name, and what follows each of its folders, with slashes, and with what a URL encodes written out."""
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
"""What names are compared by, the strictest first."""


def size_on_disk(path: str) -> tuple[int, int]:
    """Width and height of an image as Detectron2 reads it, upright by its EXIF orientation.

    Raises:
        UserError: it cannot be read as an image.
    """
    try:
        with open_image(path) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except READING_ERRORS as error:
        raise UserError(f"The image {path} cannot be read: {error}.") from error
