"""Pascal VOC: one XML file per image, and split lists in ImageSets/Main if the layout is that of the devkit."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Container
from xml.etree.ElementTree import Element

from ...errors import UserError
from ...image_files import is_image_name
from .labels import REMEDY, LabelledBox, LabelledImage, Labels, read_box, written_size
from .source import Source

OF_CLASS = re.compile(r".*\s(-1|0|1)")
"""A line of a list of a single class: an image, and whether it has an object of the class."""


def recognizes(source: Source) -> bool:
    return any(source.root_tag(file) in ("annotation", None) for file in source.having(".xml")[:5])


def read(source: Source) -> Labels:
    """Read all XML files.

    Raises:
        UserError: a file cannot be read, or an image or the labels of a listed image are missing.
    """
    split_lists = _split_lists(source)
    labels = Labels(lists_images=bool(split_lists))
    image_of: dict[str, LabelledImage | None] = {}  # None for unreadable files
    for file in source.having(".xml"):
        stem = os.path.splitext(os.path.basename(file))[0]
        image_of[stem] = None
        with source.may_be_broken():
            image_of[stem] = image = _read_image(source, file)
            if not split_lists:
                labels.add(source.split_of(file, image.file), image)
    for split, entries in split_lists.items():
        split_lists[split] = list(dict.fromkeys(_stem(entry, image_of) for entry in entries))
        for stem in split_lists[split]:
            with source.may_be_broken():
                if stem not in image_of and source.options.unlabelled == "keep":
                    image_of[stem] = _without_labels(source, stem)
                if stem not in image_of:
                    raise UserError(
                        f"{source.folder}: ImageSets/Main/{split}.txt lists {stem}, which has no label file: remove "
                        "the list if its labels are not published, or the entry, or pass --unlabelled keep if it has no objects."
                    )
                image = image_of[stem]
                if image is not None:
                    labels.add(split, image)
    if split_lists:
        listed = {stem for stems in split_lists.values() for stem in stems}
        for stem in sorted(image_of.keys() - listed):
            source.note("labels that are in no list of ImageSets/Main dropped", stem)
    _count_from_zero(source, labels)
    return labels


def _stem(entry: str, labelled: Container[str]) -> str:
    """Return an entry of a list without the suffix of an image, unless a label file has that suffix in its name, too."""
    return os.path.splitext(entry)[0] if is_image_name(entry) and entry not in labelled else entry


def _without_labels(source: Source, stem: str) -> LabelledImage:
    image = source.find_image(stem, "")
    if image is None:
        raise UserError(f"{source.folder}: ImageSets/Main lists {stem}, which has no image.")
    source.note("images without labels read as images without objects", image)
    return LabelledImage(image, [], source.path(image))


def _read_image(source: Source, file: str) -> LabelledImage:
    root, path = source.read_xml(file), source.path(file)
    if root.tag != "annotation":
        raise UserError(f"{path} is not in Pascal VOC's format: its root is {root.tag!r}, not 'annotation'.")
    stem = os.path.splitext(os.path.basename(file))[0]
    name = (root.findtext("filename") or "").strip()
    by_stem, by_name = source.candidates(stem, file), source.candidates(name, file) if name else []
    if by_stem and by_name and not {*by_stem} & {*by_name}:
        raise UserError(
            f"{path} says that its image is {name}, but its own name matches {by_stem[0]}: rename it, or correct its <filename>."
        )
    image = source.only(name or stem, by_name or by_stem)
    if image is None:
        raise UserError(f"{path}: its image {name or '(no filename)'} is not in {source.folder}: {REMEDY}.")
    boxes: list[LabelledBox] = []
    for number, node in enumerate(root.findall("object"), 1):
        with source.may_be_broken():
            boxes.append(_read_object(f"{path}: its object {number}", node))
    size = written_size(root.findtext("size/width"), root.findtext("size/height"))
    return LabelledImage(image, boxes, path, size)


def _read_object(where: str, node: Element) -> LabelledBox:
    from globox import BoundingBox

    box = read_box(where, BoundingBox.from_xml, node)
    box.difficult = (node.findtext("difficult") or "").strip().lower() in ("1", "true")
    return box


def _split_lists(source: Source) -> dict[str, list[str]]:
    """Return image stems by list in ImageSets/Main, except lists of single classes."""
    lists: dict[str, list[str]] = {}
    folders = set()
    for file in source.having(".txt"):
        folder = os.path.dirname(file)
        if not f"{os.sep}{folder}".endswith(os.path.join(os.sep, "ImageSets", "Main")):
            continue
        stems = [line.strip() for line in source.read_text(file).splitlines() if line.strip()]
        if not all(map(OF_CLASS.fullmatch, stems)):
            folders.add(folder)
            for stem in (stem for stem, count in Counter(stems).items() if count > 1):
                source.note(f"duplicate entries of {os.path.basename(file)} dropped", stem)
            lists[os.path.splitext(os.path.basename(file))[0]] = list(dict.fromkeys(stems))
    if len(folders) > 1:
        sets = " and ".join(os.path.dirname(os.path.dirname(folder)) for folder in sorted(folders))
        raise UserError(f"IN: {source.folder} contains several datasets, {sets}: convert them one at a time.")
    return lists


def _count_from_zero(source: Source, labels: Labels) -> None:
    """Convert boxes in 1-based pixels with inclusive right and bottom sides to COCO's coordinates."""
    images = {id(image): image for images in labels.splits.values() for image in images}  # lists may share images
    boxes = [box for image in images.values() for box in image.boxes]
    at_zero = [box for box in boxes if min(box.corners[:2]) <= 0]
    first_pixel = source.options.first_pixel
    if first_pixel == 0 or (first_pixel is None and at_zero):
        for box in at_zero:
            source.note("boxes that start at 0, so all coordinates are read as 0-based", box.where)
        return
    for box in boxes:
        left, top, right, bottom = box.corners
        box.corners = (left - 1, top - 1, right, bottom)
        source.note("coordinates read as 1-based, as Pascal VOC defines them (--first-pixel 0 if not)", box.where)
