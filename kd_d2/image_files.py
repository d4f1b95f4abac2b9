"""Reading of image files, with errors that name the file."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from detectron2.data import detection_utils
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, ImageFile

from .errors import UserError
from .text import printable

Content = TypeVar("Content")

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
"""Pillow's names of the supported formats. Other formats are never opened; decoders of some start external programs."""

READING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, SizeMismatchError)
"""Exceptions that Pillow and Detectron2 raise for damaged images."""

SUFFIXES = frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in IMAGE_FORMATS)


class DataError(UserError):
    """Raised when an image of a dataset cannot be used."""

    def __init__(self, message: str):
        # A worker process passes its exception on as traceback text, which ends with the message.
        super().__init__(message.rpartition(f"{__name__}.DataError: ")[2].strip())


def is_image_name(name: str) -> bool:
    """Return whether a file has an image suffix and is not hidden."""
    base = os.path.basename(name)
    return os.path.splitext(base)[1].lower() in SUFFIXES and not base.startswith(".")


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image with Pillow if its content is in one of IMAGE_FORMATS, regardless of the file's suffix."""
    with PathManager.open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
        yield image


def read_checked(path: str, read: Callable[[], Content], what: str = "image") -> Content:
    """Return the result of `read` on an image file. A truncated JPEG is decoded as far as possible, with a warning.

    Args:
        path: file that `read` loads with Pillow.
        read: function that loads the file; called a second time if the file is a truncated JPEG.
        what: what the file is, for messages.

    Raises:
        DataError: the file is missing, not in one of IMAGE_FORMATS, damaged, too large or too narrow, or its values have
            more than 8 bits.
    """
    try:
        with open_image(path) as image:
            is_jpeg = image.format in ("JPEG", "MPO")
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    "it has 16 or 32 bits a value, of which only 0 to 255 would be kept; convert it to 8 bits"
                )
        try:
            with _loaded_before_turning():
                return read()
        except OSError as error:
            if not is_jpeg or "truncated" not in str(error):
                raise
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            content = read()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
        message = f"The {what} {printable(path)} is truncated; the missing part is filled with gray."
        log_first_n(logging.WARNING, message, name=__name__, key="message")
        return content
    except READING_ERRORS as error:
        raise DataError(f"The {what} {path} cannot be used: {_reason(error)}.") from error


@contextlib.contextmanager
def _loaded_before_turning() -> Iterator[None]:
    """Load images before Detectron2 applies the EXIF orientation.

    Pillow applies it to TIFF images itself and then removes it. The EXIF data of a PNG image may follow its pixels;
    Detectron2 ignores errors while it reads them, and the part of the pixels that is missing would stay black.
    """
    original = detection_utils._apply_exif_orientation

    def apply(image: Image.Image) -> Image.Image:
        image.load()
        return original(image)

    detection_utils._apply_exif_orientation = apply
    try:
        yield
    finally:
        detection_utils._apply_exif_orientation = original


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"its format is none of {', '.join(IMAGE_FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; downscale it"
    if "must be > 0" in str(error):  # Pillow's message for a target size of 0
        return "it is so narrow that its shorter side would be less than one pixel after resizing"
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def read_image(path: str, channels: str) -> np.ndarray:
    """Read an image with Detectron2's `read_image` through `read_checked`.

    Args:
        channels: channel order, such as "BGR".

    Returns:
        Array of shape (height, width, channels).

    Raises:
        DataError: see `read_checked`.
    """
    return read_checked(path, lambda: detection_utils.read_image(path, channels))


def size_of_entry(entry: dict[str, Any]) -> tuple[int, int]:
    """Return width and height of the image of a dataset dictionary, from the file if the entry lacks them.

    Raises:
        UserError: see `size_on_disk`.
    """
    if "width" in entry and "height" in entry:
        return entry["width"], entry["height"]
    return size_on_disk(entry["file_name"])


def size_on_disk(path: str) -> tuple[int, int]:
    """Return width and height of an image as Detectron2 reads it, with the EXIF orientation applied.

    Raises:
        UserError: it cannot be read as an image.
    """
    try:
        with open_image(path) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
            if turned and image.format == "TIFF":
                image.load()  # Pillow turns TIFF images itself, old versions not before loading
                return image.size
            return image.size[::-1] if turned else image.size
    except READING_ERRORS as error:
        raise UserError(f"The image {path} cannot be read: {error}.") from error
