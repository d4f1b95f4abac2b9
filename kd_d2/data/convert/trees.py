"""Conversion of labels to COCO trees, one per split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ..coco.boxes import reaches_out
from .labels import REMEDY, LabelledBox, LabelledImage, Labels, Size
from .source import BROKEN, WHOLE, Source

Tree = dict[str, list[dict[str, Any]]]
DIFFICULT = {
    "crowd": "difficult boxes marked as crowd, which is ignored in training and evaluation",
    "keep": "difficult boxes kept as normal boxes",
    "drop": "difficult boxes dropped",
}
DIGITS = 3  # decimal places of coordinates


@dataclass
class Split:
    """A split of a dataset.

    Attributes:
        tree: "images", "annotations" and "categories" in COCO format.
        folder: folder that the image names are relative to.
    """

    tree: Tree
    folder: str


def build_splits(labels: Labels, source: Source) -> dict[str, Split]:
    """Build the splits by name, all with the same categories, and note dropped entries.

    Raises:
        UserError: there are no boxes, or an image cannot be read, has two labels, or differs in size from its labels.
    """
    _add_unlabelled(labels, source)
    used = {box.label for images in labels.splits.values() for image in images for box in image.boxes}
    if not used:
        broken = source.notes.examples.get(BROKEN)
        reason = f" (the first unreadable entry: {broken.rstrip('.')})" if broken else ""
        raise UserError(f"IN: no box was read in {source.folder}{reason}; nothing is written.")
    names = labels.classes if labels.classes is not None else sorted(used)
    return {split: Split(_build(images, names, source), source.folder) for split, images in labels.splits.items()}


def _add_unlabelled(labels: Labels, source: Source) -> None:
    labelled = {image.file for images in labels.splits.values() for image in images}
    for file in source.images:
        if file in labelled:
            continue
        if source.options.unlabelled == "keep" and not labels.lists_images:
            source.note("images without labels read as images without objects", file)
            labels.add(source.split_of(file), LabelledImage(file, [], source.path(file)))
        else:
            source.note("images without labels or in no split dropped", file)


def _build(images: list[LabelledImage], names: list[str], source: Source) -> Tree:
    number_of = {name: number for number, name in enumerate(names, 1)}
    tree: Tree = {"images": [], "annotations": []}
    known: dict[str, str] = {}
    for image in images:
        with source.may_be_broken():
            width, height = _size(image, known, source)
            number = len(tree["images"]) + 1
            tree["images"].append({"id": number, "file_name": image.file, "width": width, "height": height})
            for box, is_crowd, bbox in _boxes(image, (width, height), source):
                tree["annotations"].append(
                    {"id": len(tree["annotations"]) + 1, "image_id": number, "category_id": number_of[box.label]}
                    | {"bbox": bbox, "area": _rounded(bbox[2] * bbox[3]), "iscrowd": int(is_crowd)}
                )
    return tree | {"categories": [{"id": number, "name": name} for name, number in number_of.items()]}


def _size(image: LabelledImage, known: dict[str, str], source: Source) -> Size:
    other = known.setdefault(image.file, image.where)
    if other != image.where:
        raise UserError(f"The image {source.path(image.file)} has two labels, {other} and {image.where}: remove one.")
    return checked_size(source, image.file, image.written_size, image.where)


def checked_size(source: Source, file: str, written: Size | None, where: str) -> Size:
    """Return the size of an image file; raise a UserError if `written`, which stands in `where`, differs from it."""
    size = source.size_of(file)
    if written not in (None, size):
        raise UserError(
            f"{where} says that its image has {' x '.join(map(str, written))} pixels, but {file} has "
            f"{' x '.join(map(str, size))} (EXIF orientation applied): {REMEDY}."
        )
    return size


def _boxes(image: LabelledImage, size: Size, source: Source) -> Iterator[tuple[LabelledBox, bool, list[float]]]:
    """Yield the kept boxes, each with its iscrowd flag and as [x, y, width, height] clipped to the image."""
    seen = set()
    for box in image.boxes:
        if box.difficult:
            source.note(DIFFICULT[source.options.difficult], box.where)
            if source.options.difficult == "drop":
                continue
        left, top, right, bottom = box.corners
        if reaches_out([left, top, right - left, bottom - top], size):
            source.note("boxes clipped to their image", f"{box.where}, {box.corners}")
        left, right = (_rounded(min(max(value, 0), size[0])) for value in (left, right))
        top, bottom = (_rounded(min(max(value, 0), size[1])) for value in (top, bottom))
        bbox = [left, top, _rounded(right - left), _rounded(bottom - top)]
        is_crowd = box.crowd or (box.difficult and source.options.difficult == "crowd")
        if min(bbox[2:]) <= 0:
            source.note("boxes without area dropped", f"{box.where}, {box.corners}")
        elif (box.label, is_crowd, *bbox) in seen:
            source.note("duplicate boxes dropped", box.where)
        else:
            seen.add((box.label, is_crowd, *bbox))
            yield box, is_crowd, bbox


def _rounded(value: float) -> float:
    """Round to DIGITS decimal places; whole numbers are returned as int."""
    value = round(float(value), DIGITS)
    return int(value) if value.is_integer() else value


def share_out(splits: dict[str, Split], share: float, source: Source) -> dict[str, Split]:
    """Divide a dataset without splits into `train` and `val` by a hash of the image names.

    Raises:
        UserError: the dataset has splits, or one of the two would be empty.
    """
    if list(splits) != [WHOLE]:
        raise UserError(f"--val-share: {source.folder} already has the splits {', '.join(splits)}; leave it out.")
    whole = splits[WHOLE]
    by_hash = sorted(whole.tree["images"], key=lambda image: hashlib.sha256(os.fsencode(image["file_name"])).digest())
    count = round(share * len(by_hash))
    if not 0 < count < len(by_hash):
        raise UserError(f"--val-share {share} of {len(by_hash)} images leaves no image for train or val.")
    parts = {"train": by_hash[count:], "val": by_hash[:count]}
    return {
        name: Split(part_of(whole.tree, {image["id"] for image in part}), whole.folder) for name, part in parts.items()
    }


def part_of(tree: Tree, images: set[int]) -> Tree:
    """Return the tree with only the images of these ids and their annotations."""
    return tree | {
        "images": [image for image in tree["images"] if image["id"] in images],
        "annotations": [annotation for annotation in tree["annotations"] if annotation["image_id"] in images],
    }
