"""YOLO: one text file per image; each line has a class and a box or outline in fractions of the image."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ...errors import UserError
from ..coco.ids import whole_number
from .labels import REMEDY, LabelledBox, LabelledImage, Labels, read_box
from .source import Source
from .yolo_description import Description, images_of_splits, name_lists, read_description

LARGEST_FRACTION = 2.0


def recognizes(source: Source) -> bool:
    if (source.having(".yaml", ".yml") or name_lists(source)) and source.having(".txt"):
        return True
    texts = _texts(source)
    return any(candidate in texts for image in source.images[:50] for candidate in _label_files(image))


def read(source: Source) -> Labels:
    """Read the labels of all images of the splits. As in Ultralytics, images without a label file have no objects.

    Raises:
        UserError: there is no list of classes, images of a split are missing, or a line cannot be read.
    """
    description = read_description(source)
    labels = Labels(classes=list(description.names.values()), lists_images=True)
    texts, used = _texts(source), set()
    for split, images in images_of_splits(source, description).items():
        for image in images:
            with source.may_be_broken():
                found = next((texts[file] for file in _label_files(image) if file in texts), None)
                if found:
                    used.add(found)
                    labels.add(split, _read_labels(source, image, found, description))
                elif source.options.unlabelled != "drop":
                    source.note("images without a label file read as images without objects", image)
                    labels.add(split, LabelledImage(image, [], source.path(image)))
    stems = {os.path.splitext(os.path.basename(image))[0] for image in source.images}
    for file in sorted({*texts.values()} - used):
        folder, name = os.path.split(file)
        if os.path.basename(folder) == "labels" and os.path.splitext(name)[0] not in stems:
            source.note("label files without an image skipped", file)
    return labels


def _read_labels(source: Source, image: str, file: str, description: Description) -> LabelledImage:
    boxes: list[LabelledBox] = []
    path, size = source.path(file), source.size_of(image)
    for number, line in enumerate(source.read_text(file).splitlines(), 1):
        if line.strip():
            with source.may_be_broken():
                boxes.append(_read_line(source, f"{path}: its line {number}", line.split(), size, description))
    return LabelledImage(image, boxes, path)


def _read_line(
    source: Source, where: str, values: list[str], size: tuple[int, int], description: Description
) -> LabelledBox:
    from globox import BoundingBox, BoxFormat

    keypoint_values = description.keypoint_values
    if len(values) in (6, 6 + keypoint_values):
        source.note("scores of boxes dropped", where)
        values = values[:-1]
    if keypoint_values and len(values) == 5 + keypoint_values:
        source.note("keypoints dropped", where)
        values = values[:5]
    line = " ".join(values)
    if len(values) == 5:
        box = read_box(where, BoundingBox.from_txt, line, box_format=BoxFormat.XYWH, relative=True, image_size=size)
    else:
        box = read_box(where, BoundingBox.from_yolo_seg, line, image_size=size)
        source.note("outlines and rotated boxes converted to their bounding boxes", where)
    if any(abs(float(value)) > LARGEST_FRACTION for value in values[1:]):
        raise UserError(
            f"{where} has a number above {LARGEST_FRACTION:g}, but YOLO's are fractions of the image: {REMEDY}."
        )
    try:
        label = whole_number(float(box.label))  # numpy.savetxt writes 1 as "1.0e+00"
    except ValueError:
        label = None
    if label not in description.names:
        raise UserError(
            f"{where} has class {box.label}, but {source.path(description.file)} has the classes 0 to "
            f"{max(description.names)}: add its name there, or correct the line."
        )
    box.label = description.names[label]
    return box


def _texts(source: Source) -> dict[str, str]:
    """Return the text files by their names with the suffix in lower case."""
    return {os.path.splitext(file)[0] + ".txt": file for file in source.having(".txt")}


def _label_files(image: str) -> Iterator[str]:
    """Yield possible label files of an image: in a folder `labels` that replaces `images`, or next to the image."""
    folder, name = os.path.split(image)
    text = os.path.splitext(name)[0] + ".txt"
    parts = folder.split(os.sep)
    for place in reversed(range(len(parts))):
        if parts[place].lower() == "images":
            yield os.path.join(*parts[:place], "labels", *parts[place + 1 :], text)
    yield os.path.join(folder, text)
    yield os.path.join(folder, "labels", text)
    yield os.path.join(os.path.dirname(folder), "labels", text)
