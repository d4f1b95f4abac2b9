"""LabelMe: one JSON file per image, with rectangles and polygons."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from ...errors import UserError
from ..coco import read_json_bytes
from .labels import REMEDY, LabelledBox, LabelledImage, Labels, read_box, written_size
from .source import Source

SHAPES = ("rectangle", "polygon", "mask")
"""Shape types whose points enclose the object; the points of `mask` are the corners of its box."""


def recognizes(source: Source) -> bool:
    for file in source.having(".json")[:5]:
        with contextlib.suppress(UserError):  # raised again when the file is read
            if _is_labelme(_read_json(source, file)):
                return True
    return False


def read(source: Source) -> Labels:
    """Read all JSON files.

    Raises:
        UserError: a file cannot be read, or its image is missing.
    """
    labels = Labels()
    for file in source.having(".json"):
        with source.may_be_broken():
            tree = _read_json(source, file)
            if not _is_labelme(tree):
                source.note("json files skipped that are not in LabelMe's format", file)
                continue
            image = _read_image(source, file, tree)
            labels.add(source.split_of(file, image.file), image)
    return labels


def _read_json(source: Source, file: str) -> Any:
    source.read_bytes(file)  # rejects files that are too large
    return read_json_bytes(source.path(file))[0]


def _is_labelme(tree: Any) -> bool:
    return isinstance(tree, dict) and isinstance(tree.get("shapes"), list) and "imagePath" in tree


def _read_image(source: Source, file: str, tree: dict[str, Any]) -> LabelledImage:
    path, name = source.path(file), str(tree["imagePath"] or "")
    stem = os.path.splitext(os.path.basename(file))[0]
    image = (source.find_image(name, file) if name else None) or source.find_image(stem, file)
    if image is None:
        raise UserError(f"{path}: its image {name or '(no imagePath)'} is not in {source.folder}: {REMEDY}.")
    boxes: list[LabelledBox] = []
    group_of: dict[tuple[str, str], LabelledBox] = {}
    for number, shape in enumerate(tree["shapes"], 1):
        with source.may_be_broken():
            box = _read_shape(source, f"{path}: its shape {number}", shape)
            if box is None:
                continue
            group = shape.get("group_id")
            whole = group_of.setdefault((box.label, str(group)), box) if group is not None else box
            if whole is box:
                boxes.append(box)
            else:
                source.note("shapes with the same group_id merged into one object", box.where)
                whole.corners = _around(whole, box)
    size = written_size(tree.get("imageWidth"), tree.get("imageHeight"))
    return LabelledImage(image, boxes, path, size)


def _read_shape(source: Source, where: str, shape: Any) -> LabelledBox | None:
    from globox import BoundingBox

    if not isinstance(shape, dict):
        raise UserError(f"{where} is {str(shape)[:80]!r}, not a JSON object.")
    kind = shape.get("shape_type", "polygon")  # LabelMe's default for old files
    if kind not in SHAPES:
        source.note("shapes without a box dropped, such as points, lines and circles", f"{where}, a {kind}")
        return None
    if kind != "rectangle":
        source.note("outlines converted to their bounding boxes", where)
    box = read_box(where, BoundingBox.from_labelme, shape)
    box.difficult = shape.get("difficult") is True
    return box


def _around(a: LabelledBox, b: LabelledBox) -> tuple[float, float, float, float]:
    least = [min(pair) for pair in zip(a.corners[:2], b.corners[:2])]
    most = [max(pair) for pair in zip(a.corners[2:], b.corners[2:])]
    return (*least, *most)
