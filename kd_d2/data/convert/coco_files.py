"""COCO JSON files as exported by common tools; files that can be used directly need no conversion."""

from __future__ import annotations

import filecmp
import os
import re

from ...errors import UserError
from ..coco import CocoData, read_coco, read_json_bytes
from ..coco.reader import LISTS, MissingImagesError
from .source import BROKEN, SPLIT, WHOLE, Source
from .trees import Split, Tree, checked_size, part_of


def recognizes(source: Source) -> bool:
    return any(_is_coco(source, file) for file in source.having(".json")[:5])


def read_splits(source: Source) -> dict[str, Split]:
    """Return the splits by name, and note repairs.

    Raises:
        UserError: there is no COCO file, `read_coco` rejects one, or two different files have the same split.
    """
    splits: dict[str, Split] = {}
    file_of: dict[str, str] = {}
    for file in source.having(".json"):
        if not _is_coco(source, file):
            source.note("json files skipped that are not in COCO's format", file)
            continue
        split = _split_of(source, file)
        if split in splits and filecmp.cmp(source.path(file), source.path(file_of[split]), shallow=False):
            source.note("duplicate json files skipped", f"{file} is {file_of[split]}")
            continue
        if split in splits:
            raise UserError(
                f"IN: {source.folder} has several COCO files for the split {split}, the second is {file}: convert the folder of one "
                "dataset, or name the file in DATASETS.COCO_JSON."
            )
        data, folder = _read(source, file, split)
        for kind, count in data.repairs.counts.items():
            for _ in range(count):
                source.note(kind, f"{file}, {data.repairs.examples[kind]}")
        splits[split], file_of[split] = Split(_with_right_sizes(source, file, data.tree, folder), folder), file
    if not splits:
        raise UserError(f"IN: {source.folder} has no json file in COCO's format; nothing is written.")
    return splits


def _read(source: Source, file: str, split: str) -> tuple[CocoData, str]:
    """Read a file with the first folder that has all its images, or, with --drop-broken, the one that has the most."""
    path = source.path(file)
    errors: dict[str, MissingImagesError] = {}
    for folder in _image_folders(source, file, split):
        try:
            return read_coco(path, folder), folder
        except MissingImagesError as error:
            errors[folder] = error
    folder = max(errors, key=lambda folder: errors[folder].found)
    if not errors[folder].found:
        raise errors[folder]
    if not source.options.drop_broken:
        raise UserError(f"{str(errors[folder]).rstrip('.')}, or leave them out with --drop-broken.") from errors[folder]
    return read_coco(path, folder, drop_missing=True), folder


def _with_right_sizes(source: Source, file: str, tree: Tree, folder: str) -> Tree:
    """Return the tree, with --drop-broken without images that are unreadable or of another size than in `file`.

    Raises:
        UserError: there is such an image, or with --drop-broken no other one.
    """
    kept = set()
    for image in tree["images"]:
        with source.may_be_broken():
            name = os.path.relpath(os.path.join(folder, image["file_name"]), source.folder)
            checked_size(source, name, (image["width"], image["height"]), file)
            kept.add(image["id"])
    if not kept:
        raise UserError(f"{file} has no usable image; the first: {source.notes.examples[BROKEN]}")
    return part_of(tree, kept)


def _is_coco(source: Source, file: str) -> bool:
    try:
        tree = read_json_bytes(source.path(file))[0]
    except UserError:
        return False
    return isinstance(tree, dict) and all(isinstance(tree.get(key), list) for key in LISTS)


def _split_of(source: Source, file: str) -> str:
    words = re.split(r"[_.\-]", os.path.splitext(os.path.basename(file))[0])
    named = [word.lower() for word in words if SPLIT.fullmatch(word)]
    return named[0] if named else source.split_of(file)


def _image_folders(source: Source, file: str, split: str) -> list[str]:
    """Return the candidate image folders that contain images, most likely first."""
    beside = os.path.dirname(file)
    above = os.path.dirname(beside)
    names = [part for part in (split, "images") if part != WHOLE]
    places = [
        os.path.join(above, "images", split),
        *(os.path.join(place, n) for place in (beside, above) for n in names),
    ]
    found = [
        source.path(place) if place else source.folder
        for place in [*places, beside, above]
        if any(image.startswith(os.path.join(place, "")) for image in source.images)
    ]
    return list(dict.fromkeys(found or [source.folder]))
