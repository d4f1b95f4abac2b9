"""Box formats, and detection of files whose boxes are not in COCO's [x, y, width, height]."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from ...errors import UserError

Box = list[float]
Size = tuple[float, float]
"""Width and height of an image."""


def _corners(box: Box, size: Size) -> Box:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _center(box: Box, size: Size) -> Box:
    x, y, width, height = box
    return [x - width / 2, y - height / 2, width, height]


def _fractions(box: Box, size: Size, convert: Callable[[Box, Size], Box]) -> Box:
    return convert([value * size[side % 2] for side, value in enumerate(box)], size)


def _as_it_is(box: Box, size: Size) -> Box:
    return box


BOX_FORMATS: dict[str, Callable[[Box, Size], Box]] = {
    "xywh": _as_it_is,
    "xyxy": _corners,
    "cxcywh": _center,
    "relative-xywh": partial(_fractions, convert=_as_it_is),
    "relative-xyxy": partial(_fractions, convert=_corners),
    "relative-cxcywh": partial(_fractions, convert=_center),
}
"""Functions by format name that convert a box, given its image's size, to COCO's [x, y, width, height] in pixels.

xyxy: corners; cxcywh: center, width and height; relative formats: fractions of the image's width and height.
"""


def reaches_out(box: Box, size: Size) -> bool:
    """Return whether a box in COCO's format extends more than one pixel beyond its image."""
    x, y, width, height = box
    return x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1


def overlaps(box: Box, size: Size) -> bool:
    """Return whether a box in COCO's format has area inside its image."""
    x, y, width, height = box
    return max(x, 0) < min(x + width, size[0]) and max(y, 0) < min(y + height, size[1])


def check_format(path: str, boxes: Iterable[tuple[Box, Size]]) -> None:
    """Raise a UserError if boxes are clearly not [x, y, width, height] in pixels.

    Args:
        path: annotation file.
        boxes: unconverted boxes, each with the size of its image.
    """
    boxes = [(box, size) for box, size in boxes if box[2] > 0 and box[3] > 0]
    if not boxes:
        return
    if all(max(map(abs, box)) <= 1 for box, _ in boxes) and any(min(size) > 2 for _, size in boxes):
        raise UserError(
            f"{path}: all its boxes are between 0 and 1, such as {boxes[0][0]}, so they are fractions of the image; convert them to "
            "pixels, as COCO's x, y, width, height."
        )
    beyond = [box for box, size in boxes if reaches_out(box, size)]
    if 2 * len(beyond) > len(boxes) and all(_fits_as_corners(box, size) for box, size in boxes):
        raise UserError(
            f"{path}: {len(beyond)} of its {len(boxes)} boxes end outside their image, such as {beyond[0]}, while all fit as "
            "corners x1, y1, x2, y2; convert them to COCO's x, y, width, height."
        )


def _fits_as_corners(box: Box, size: Size) -> bool:
    left, top, right, bottom = box
    return -1 <= left < right <= size[0] + 1 and -1 <= top < bottom <= size[1] + 1
