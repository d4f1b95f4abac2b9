"""Access to the files of a converted folder, with their splits and the lookup of images by name."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from operator import ne
from xml.etree import ElementTree
from xml.parsers import expat

from ...errors import UserError
from ...image_files import is_image_name, size_on_disk
from ..coco import ImageFinder, Repairs

SPLIT = re.compile(r"(trainval|train|training|val|valid|validation|minival|dev|test|testing)(\d{4})?", re.IGNORECASE)
WHOLE = "all"
"""Name of the split of files that belong to no split."""
BROKEN = "unreadable entries dropped"
MASKS = re.compile(r"Segmentation(Class|Object)\w*", re.IGNORECASE)
"""Folders of segmentation masks, which are named like the images, in Pascal VOC's devkit and LabelMe's exports."""
LINKS = "links to folders not followed"
LARGEST_FILE = 256 * 2**20
"""Maximum size in bytes of a label file."""


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        difficult: treatment of boxes that are marked as difficult: "crowd" (COCO's iscrowd, ignored in training and
            evaluation), "keep" or "drop".
        first_pixel: coordinate of the first pixel in Pascal VOC files, 0 or 1; None: 0 if any box starts at 0, else 1.
        unlabelled: treatment of images without labels: "keep" without objects, or "drop"; None: default of the format.
        drop_broken: whether unreadable entries are dropped instead of raising an error.
        val_share: fraction of the images used as split val if the dataset has no splits.
    """

    difficult: str = "crowd"
    first_pixel: int | None = None
    unlabelled: str | None = None
    drop_broken: bool = False
    val_share: float = 0.0


class Source:
    """The folder tree of a dataset.

    Args:
        folder: root folder.
        options: conversion options.
        without: subfolder to exclude.

    Attributes:
        notes: record of dropped and modified entries.
        files: paths of all files except hidden ones, relative to the root.
        images: the files with an image suffix, except segmentation masks.
    """

    def __init__(self, folder: str, options: ConvertOptions, without: str | None = None):
        if not os.path.isdir(folder):
            raise UserError(f"IN: there is no folder {folder}.")
        self.folder = folder
        self.options = options
        self.notes = Repairs(folder)
        self.files = sorted(_files_below(folder, without, self.notes))
        self.images = []
        for file in filter(is_image_name, self.files):
            if any(map(MASKS.fullmatch, _folders(file))):
                self.note("segmentation masks not read as images", file)
            else:
                self.images.append(file)
        if not self.images:
            link = self.notes.examples.get(LINKS)
            reason = f" (the link {link} to a folder is not followed)" if link else ""
            raise UserError(f"IN: there is no image in {folder}{reason}; specify the folder of images and labels.")
        self._known_images = frozenset(self.images)
        self.size_of = cache(lambda image: size_on_disk(self.path(image)))

    def path(self, file: str) -> str:
        return os.path.join(self.folder, file)

    def having(self, *suffixes: str) -> list[str]:
        """Return the files with one of the suffixes, such as ".xml"."""
        return [file for file in self.files if file.lower().endswith(suffixes)]

    def split_of(self, *files: str) -> str:
        """Return the first parent folder of the files that is named like a split, or WHOLE if there is none."""
        folders = chain.from_iterable(map(_folders, files))
        return next((folder.lower() for folder in folders if SPLIT.fullmatch(folder)), WHOLE)

    def find_image(self, name: str, labels: str, subset: str = "") -> str | None:
        """Return the image that a label file refers to by `name`, or None if there is none; see `candidates`.

        Raises:
            UserError: several images match.
        """
        return self.only(name, self.candidates(name, labels, subset))

    def only(self, name: str, found: list[str]) -> str | None:
        """Return the only image among those that match a name; see `ImageFinder.only`."""
        return self._finders[None].only(name, found)

    def candidates(self, name: str, labels: str, subset: str = "") -> list[str]:
        """Return the images that a label file may refer to by `name`: the one next to it, else those of its split.

        Among several, those in a folder named like the image's subset are preferred, then those whose folder differs
        from the label file's in one place, such as images/a and labels/a.
        """
        beside = os.path.normpath(os.path.join(os.path.dirname(labels), name.replace("\\", "/")))
        if beside in self._known_images:
            return [beside]
        found = self._finders.get(self.split_of(labels), self._finders[None]).candidates(name)
        if len(found) > 1:
            found = [image for image in found if subset.lower() in _folders(image.lower())] or found
        if len(found) > 1:
            found = [image for image in found if _mirrors(_folders(image), _folders(labels))] or found
        return found

    @contextlib.contextmanager
    def may_be_broken(self) -> Iterator[None]:
        """With --drop-broken, note and suppress a UserError raised in the block."""
        try:
            yield
        except UserError as error:
            if not self.options.drop_broken:
                raise
            self.note(BROKEN, error)

    def note(self, kind: str, example: object) -> None:
        """Count a dropped or modified entry; paths in `example` are shortened to be relative to the root."""
        self.notes.add(kind, str(example).replace(os.path.join(self.folder, ""), ""))

    def read_xml(self, file: str) -> ElementTree.Element:
        """Return the root element of an XML file; entities, which could expand without bound, are rejected."""
        content, path = self.read_bytes(file), self.path(file)

        def refuse(name: str, *_: object) -> None:
            raise UserError(f"{path} declares the entity {name!r}, which labels do not need: remove its DOCTYPE.")

        try:
            scanner = expat.ParserCreate()
            scanner.EntityDeclHandler = refuse
            scanner.Parse(content, True)
            return ElementTree.fromstring(content)
        except (expat.ExpatError, ElementTree.ParseError, LookupError, ValueError) as error:
            raise UserError(f"{path} is not readable XML: {error}.") from error

    def root_tag(self, file: str) -> str | None:
        """Return the tag of an XML file's root element, or None if the file cannot be read."""
        try:
            return self.read_xml(file).tag
        except UserError:
            return None

    def read_bytes(self, file: str) -> bytes:
        """Return the content of a file of at most LARGEST_FILE bytes."""
        path = self.path(file)
        try:
            if not os.path.isfile(path) or os.path.getsize(path) > LARGEST_FILE:
                raise UserError(f"{path} is not a regular file of at most {LARGEST_FILE // 2**20} MiB.")
            with open(path, "rb") as opened:
                return opened.read()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error

    def read_text(self, file: str) -> str:
        """Return the text of a UTF-8 file."""
        try:
            return self.read_bytes(file).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path(file)} is not text in UTF-8: {error}.") from error

    @cached_property
    def _finders(self) -> dict[str | None, ImageFinder]:
        """Image finders by split, with None for all images."""
        of_split: dict[str | None, list[str]] = {None: self.images}
        for image in self.images:
            of_split.setdefault(self.split_of(image), []).append(image)
        if list(of_split) != [None, WHOLE]:
            of_split[WHOLE] = self.images
        return {split: ImageFinder(self.folder, images) for split, images in of_split.items()}


def _folders(file: str) -> list[str]:
    return file.split(os.sep)[:-1]


def _mirrors(folders: list[str], others: list[str]) -> bool:
    return len(folders) == len(others) and sum(map(ne, folders, others)) == 1


def _files_below(folder: str, without: str | None, notes: Repairs) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"IN: the folder {error.filename} cannot be read: {error.strerror}.") from error

    for place, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [n for n in subfolders if n[0] != "." and n != "__MACOSX" and os.path.join(place, n) != without]
        for link in filter(os.path.islink, (os.path.join(place, name) for name in subfolders)):
            notes.add(LINKS, os.path.relpath(link, folder))
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in names if name[0] != ".")
