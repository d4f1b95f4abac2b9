"""Open Images: one CSV file of boxes per split, and one with the class names."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from typing import Any

from ...errors import UserError
from ...text import composed
from .labels import LabelledBox, LabelledImage, Labels, read_box
from .source import Source

CORNERS = ("XMin", "YMin", "XMax", "YMax")
COLUMNS = ("ImageID", "LabelName", *CORNERS)


def recognizes(source: Source) -> bool:
    return any(_is_boxes(source, file) for file in source.having(".csv"))


def read(source: Source) -> Labels:
    """Read all CSV files of boxes. Rows of missing images are skipped, since the set is usually downloaded in part.

    Raises:
        UserError: a file or a row cannot be read.
    """
    labels, names = Labels(), _class_names(source)
    for file in source.having(".csv"):
        if not _is_boxes(source, file):
            continue
        images: dict[str, LabelledImage | None] = {}
        for where, row in _rows(source, file):
            name = row["ImageID"] or ""
            if name not in images:
                images[name] = _add_image(source, file, name, labels)
            image = images[name]
            if image is None:
                source.note("boxes of missing images dropped", f"{where}, {name}")
                continue
            with source.may_be_broken():
                image.boxes.append(_read_row(source, where, row, image.file, names))
    return labels


def _add_image(source: Source, file: str, name: str, labels: Labels) -> LabelledImage | None:
    found = source.find_image(name, file) if name else None
    if found is None:
        return None
    image = LabelledImage(found, [], f"{source.path(file)} ({name})")
    prefix = re.match(r"(train|validation|test)-", os.path.basename(file))
    labels.add(prefix[1] if prefix else source.split_of(file, found), image)
    return image


def _read_row(source: Source, where: str, row: dict[str, Any], image: str, names: dict[str, str]) -> LabelledBox:
    from globox import BoundingBox

    def create() -> BoundingBox:
        corners = tuple(float(row[side]) for side in CORNERS)
        return BoundingBox.create(
            label=row["LabelName"], coords=corners, relative=True, image_size=source.size_of(image)
        )

    box = read_box(where, create)
    box.label = names.get(box.label, box.label)
    box.crowd = row.get("IsGroupOf") == "1"
    return box


def _rows(source: Source, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = source.path(file)
    try:
        with open(path, newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            for row in reader:
                yield f"{path}: its line {reader.line_num}", row
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not readable csv: {error}.") from error


def _is_boxes(source: Source, file: str) -> bool:
    try:
        with open(source.path(file), newline="", encoding="utf-8-sig") as opened:
            header = opened.readline(10_000).strip().split(",")
    except (OSError, ValueError):
        return False
    return all(column in header for column in COLUMNS)


def _class_names(source: Source) -> dict[str, str]:
    """Return class names by label id, such as /m/01g317, from all CSV files with "class" in their names."""
    from globox import AnnotationSet

    names: dict[str, str] = {}
    for file in source.having(".csv"):
        if _is_boxes(source, file) or "class" not in os.path.basename(file).lower():
            continue
        try:
            found = AnnotationSet.parse_mid_file(source.path(file))
        except (OSError, ValueError, KeyError, csv.Error) as error:
            raise UserError(f"{source.path(file)} is not a list of classes: {error}.") from error
        names |= {key: composed(name.strip()) for key, name in found.items() if name and key != "LabelName"}
    return names
