"""What every format is read into: images with labelled boxes, in splits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ..coco.ids import whole_number

if TYPE_CHECKING:
    from globox import BoundingBox

REMEDY = "correct it, or leave out what cannot be read with --drop-broken"
LARGEST = 1e9  # px

Size = tuple[int, int]
"""Width and height of an image in pixels."""


@dataclass(slots=True)
class LabelledBox:
    """An object.

    Attributes:
        label: its class.
        corners: left, top, right, bottom in pixels.
        where: file and entry, for messages.
        difficult: marked as hard to recognize, and not to be counted.
        crowd: stands for a group of objects.
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
        file: path below the folder that is converted.
        boxes: its objects.
        where: what labels it, for messages.
        written_size: its size as the labels say it; None where they do not.
    """

    file: str
    boxes: list[LabelledBox]
    where: str
    written_size: Size | None = None


@dataclass
class Labels:
    """A dataset.

    Attributes:
        splits: by name the images.
        classes: in the order of the dataset; None where it has none: sorted by name then.
        lists_images: whether the dataset lists the images of its splits, so that others are in none.
    """

    splits: dict[str, list[LabelledImage]] = field(default_factory=dict)
    classes: list[str] | None = None
    lists_images: bool = False

    def add(self, split: str, image: LabelledImage) -> None:
        """Add an image to a split."""
        self.splits.setdefault(split, []).append(image)


def written_size(width: Any, height: Any) -> Size | None:
    """The size of an image as labels say it, in any form of whole numbers; None where they do not."""
    size = whole_number(width), whole_number(height)
    return size if all(size) else None


def read_box(where: str, read: Callable[..., BoundingBox], *arguments: Any, **options: Any) -> LabelledBox:
    """What one of globox's readers of a box makes of an entry.

    Args:
        where: file and entry, for messages.
        read: such as `BoundingBox.from_xml`.

    Raises:
        UserError: it is no box, or has no class.
    """
    from globox.errors import ParsingError

    try:
        box = read(*arguments, **options)
    except (ParsingError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"{where} is no box ({reason}): {REMEDY}.") from error
    if not all(math.isfinite(value) and abs(value) < LARGEST for value in box.ltrb):
        raise UserError(f"{where} has the corners {box.ltrb}, which are not all finite: {REMEDY}.")
    label = box.label.strip()
    if not label:
        raise UserError(f"{where} has no class: {REMEDY}.")
    return LabelledBox(label, box.ltrb, where)
