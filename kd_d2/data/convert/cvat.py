"""CVAT for images 1.1: one XML file for all images."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from ...errors import UserError
from ...text import composed
from .labels import REMEDY, LabelledBox, LabelledImage, Labels, read_box, written_size
from .source import Source

WITHOUT_BOX = ("polyline", "points", "mask", "cuboid", "skeleton", "ellipse")


def recognizes(source: Source) -> bool:
    return any(source.root_tag(file) == "annotations" for file in source.having(".xml")[:5])


def read(source: Source) -> Labels:
    """Read all XML files.

    Raises:
        UserError: a file cannot be read or is in the format CVAT for video, or an image is missing.
    """
    labels, order = Labels(), {}
    for file in source.having(".xml"):
        root, path = source.read_xml(file), source.path(file)
        if root.tag != "annotations":
            raise UserError(f"{path} is not in CVAT's format: its root is {root.tag!r}, not 'annotations'.")
        if root.find("track") is not None:
            raise UserError(f"{path} has tracks of a video: export the task as 'CVAT for images'.")
        classes = [label for label in root.findall("meta//label") if not label.findtext("parent")]
        order |= {composed(name.strip()): None for label in classes if (name := label.findtext("name"))}
        for node in root.iter("image"):
            with source.may_be_broken():
                image = _read_image(source, file, node)
                split = (node.get("subset") or "").lower()
                labels.add(source.split_of(file, image.file) if split in ("", "default") else split, image)
    used = {box.label for images in labels.splits.values() for image in images for box in image.boxes}
    labels.classes = list(order) if used <= order.keys() and order else None
    return labels


def _read_image(source: Source, file: str, node: Element) -> LabelledImage:
    path, name = source.path(file), node.get("name") or ""
    image = source.find_image(name, file, node.get("subset") or "") if name else None
    if image is None:
        raise UserError(f"{path}: its image {name or '(no name)'} is not in {source.folder}: {REMEDY}.")
    boxes: list[LabelledBox] = []
    for number, shape in enumerate(node, 1):
        where = f"{path}: the image {name}, its shape {number}"
        with source.may_be_broken():
            box = _read_shape(source, where, shape)
            if box is not None:
                boxes.append(box)
    return LabelledImage(image, boxes, f"{path} ({name})", written_size(node.get("width"), node.get("height")))


def _read_shape(source: Source, where: str, shape: Element) -> LabelledBox | None:
    from globox import BoundingBox

    if shape.tag == "box":
        if (shape.get("rotation") or "0").strip("0.") != "":
            raise UserError(f"{where} is a rotated box, which cannot be converted: {REMEDY}.")
        return read_box(where, BoundingBox.from_cvat, shape)
    if shape.tag == "polygon":
        source.note("outlines converted to their bounding boxes", where)
        return read_box(where, lambda: BoundingBox.from_labelme(_as_labelme(shape)))
    if shape.tag in WITHOUT_BOX:
        source.note("shapes without a box dropped, such as points and lines", f"{where}, a {shape.tag}")
    return None


def _as_labelme(polygon: Element) -> dict[str, object]:
    """Return a polygon in LabelMe format, from which globox reads its bounding box."""
    points = [point.split(",") for point in (polygon.get("points") or "").split(";")]
    return {"label": polygon.get("label") or "", "points": [[float(x), float(y)] for x, y in points]}
