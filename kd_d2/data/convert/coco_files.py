"""COCO json files as tools export them, in clean form; for sets that are used as they are, no conversion is needed."""

from __future__ import annotations

import os
import re
from filecmp import cmp

from ...errors import UserError
from ..coco import read_coco, read_json_bytes
from ..coco.reader import LISTS, MissingImagesError
from .source import SPLIT, WHOLE, Source
from .trees import Split


def recognizes(source: Source) -> bool:
    return any(_is_coco(source, file) for file in source.having(".json")[:5])


def read_splits(source: Source) -> dict[str, Split]:
    """The splits by name; repairs are noted.

    Raises:
        UserError: a file is refused by `read_coco`, or two are of one split.
    """
    splits: dict[str, Split] = {}
    file_of: dict[str, str] = {}
    for file in source.having(".json"):
        if not _is_coco(source, file):
            source.note("json files left out that are not COCO's", file)
            continue
        split = _split_of(source, file)
        if split in splits and cmp(source.path(file), source.path(file_of[split]), shallow=False):
            source.note("json files left out that repeat another", f"{file} is {file_of[split]}")
            continue
        if split in splits:
            raise UserError(
                f"IN: {source.folder} has several COCO files of the split {split}, the second is {file}: convert the folder of one "
                "data set, or name the file in DATASETS.COCO_JSON."
            )
        folder = _image_folder(source, file, split)
        try:
            data = read_coco(source.path(file), folder, drop_missing=source.options.drop_broken)
        except MissingImagesError as error:
            raise UserError(f"{str(error).rstrip('.')}, or leave them out with --drop-broken.") from error
        for kind, count in data.repairs.counts.items():
            for _ in range(count):
                source.note(kind, f"{file}, {data.repairs.examples[kind]}")
        splits[split], file_of[split] = Split(data.tree, folder), file
    return splits


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


def _image_folder(source: Source, file: str, split: str) -> str:
    """Of the folders where tools put images the first that has an image."""
    beside = os.path.dirname(file)
    above = os.path.dirname(beside)
    names = [part for part in (split, "images") if part != WHOLE]
    places = [
        os.path.join(above, "images", split),
        *(os.path.join(place, n) for place in (beside, above) for n in names),
    ]
    for place in [*places, beside, above]:
        if any(image.startswith(os.path.join(place, "")) for image in source.images):
            return source.path(place) if place else source.folder
    return source.folder
