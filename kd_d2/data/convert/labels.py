"""Common representation of all formats: splits of images with labeled boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...text import composed
from ..coco.ids import whole_number

if TYPE_CHECKING:
    from globox import BoundingBox

REMEDY = "correct it, or pass --drop-broken to skip unreadable entries"
LARGEST = 1e9  # px

Size = tuple[int, int]
"""Width and height of an image in pixels."""


@dataclass(slots=True)
class LabelledBox:
    """An object.

    Attributes:
        label: class name.
        corners: left, top, right, bottom in pixels.
        where: file and entry, for messages.
        difficult: whether it is marked as hard to recognize and is ignored in evaluation.
        crowd: whether it is a group of objects.
    """

    label: str
    corners: tuple[float, float, float, float]
    where: str
    difficult: bool = False
    crowd: bool = False


@dataclass
class LabelledImage:
    """An image with its objects.

    Attributes:
        file: path relative to the converted folder.
        boxes: objects of the image.
        where: source of its labels, for messages.
        written_size: image size in the labels; None if they have none.
    """

    file: str
    boxes: list[LabelledBox]
    where: str
    written_size: Size | None = None


@dataclass
class Labels:
    """A labeled dataset.

    Attributes:
        splits: images by split name.
        classes: class names in the dataset's order; None if it has no order, in which case they are sorted by name.
        lists_images: whether the dataset lists the images of its splits; other images are then in no split.
    """

    splits: dict[str, list[LabelledImage]] = field(default_factory=dict)
    classes: list[str] | None = None
    lists_images: bool = False

    def add(self, split: str, image: LabelledImage) -> None:
        """Add an image to a split."""
        self.splits.setdefault(split, []).append(image)


def written_size(width: Any, height: Any) -> Size | None:
    """Return the image size from labels, in any notation of whole numbers, or None if it is missing."""
    size = whole_number(width), whole_number(height)
    return size if all(size) else None


def read_box(where: str, read: Callable[..., BoundingBox], *arguments: Any, **options: Any) -> LabelledBox:
    """Read a box with one of globox's parsers.

    Args:
        where: file and entry, for messages.
        read: parser, such as `BoundingBox.from_xml`; called with the remaining arguments.

    Raises:
        UserError: the entry is not a valid box, or has no class.
    """
    from globox.errors import ParsingError

    try:
        box = read(*arguments, **options)
    except (ParsingError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"{where} is not a valid box ({reason}): {REMEDY}.") from error
    if not all(math.isfinite(value) and abs(value) < LARGEST for value in box.ltrb):
        raise UserError(f"{where} has the corners {box.ltrb}, which are not all finite: {REMEDY}.")
    label = composed(box.label.strip())
    if not label:
        raise UserError(f"{where} has no class: {REMEDY}.")
    return LabelledBox(label, box.ltrb, where)
