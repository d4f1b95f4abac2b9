"""Image loading with errors that name the file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, detection_utils
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from ..config import thawed
from ..errors import UserError
from ..text import printable
from .workers import configure_workers

logger = logging.getLogger(__name__)


class DataError(UserError):
    """Raised when an image of a dataset cannot be used."""

    def __init__(self, message: str):
        # A worker process passes its exception on as traceback text, which ends with the message.
        super().__init__(message.rpartition(f"{__name__}.DataError: ")[2].strip())


IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
"""Pillow's names of the supported formats. Other formats are never opened; decoders of some start external programs."""

READING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, SizeMismatchError)
"""Exceptions that Pillow and Detectron2 raise for damaged images."""

Content = TypeVar("Content")
Entry = TypeVar("Entry")


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


class CheckedMapper:
    """A dataset mapper whose errors name the image file.

    Args:
        mapper: function of a dataset dictionary, such as Detectron2's DatasetMapper.
    """

    def __init__(self, mapper: Callable[[dict], Any]):
        self.mapper = mapper

    def __call__(self, entry: dict) -> Any:
        """Apply the mapper to an entry.

        Raises:
            DataError: see `read_checked`; or the image size differs from the one in the annotations or of the semantic
                segmentation.
        """
        if "file_name" not in entry:
            return self.mapper(entry)
        return read_checked(entry["file_name"], lambda: self._map(entry))

    def _map(self, entry: dict) -> Any:
        try:
            mapped = self.mapper(entry)
            if isinstance(mapped, dict) and getattr(mapped.get("image"), "dtype", None) is torch.float64:  # YUV
                mapped["image"] = mapped["image"].float()
            return mapped
        except (*READING_ERRORS, AssertionError) as error:
            if "sem_seg_file_name" in entry and not isinstance(error, SizeMismatchError):
                _check_semantic_segmentation(entry["file_name"], entry["sem_seg_file_name"])
            raise


def _check_semantic_segmentation(image: str, path: str) -> None:
    """Raise a DataError if a semantic segmentation cannot be read, or has another size than its image."""
    height, width = detection_utils.read_image(image, "L").shape[:2]  # its errors are those of the image
    labels = read_checked(path, lambda: detection_utils.read_image(path, "L"), "semantic segmentation")
    if labels.shape[:2] != (height, width):
        raise DataError(
            f"The semantic segmentation {path} has {labels.shape[1]} x {labels.shape[0]} pixels, but its image {image} has {width} x {height}."
        )


@dataclass(frozen=True)
class _OrError:
    """A dataset mapper that returns the DataError of another one instead of raising it."""

    mapper: Callable[[dict], Any]

    def __call__(self, entry: dict) -> Any:
        try:
            return self.mapper(entry)
        except DataError as error:
            return error


def _without_errors(batch: list) -> list:
    for error in batch:
        if isinstance(error, DataError):
            logger.warning(f"{error} It is left out.")
    return [entry for entry in batch if not isinstance(entry, DataError)]


def evenly_spaced(entries: Sequence[Entry], count: int) -> Sequence[Entry]:
    """Return `count` of the entries, from the first to the last, or all if there are not more."""
    if count >= len(entries):
        return entries
    return [entries[round(place)] for place in np.linspace(0, len(entries) - 1, count)]


def build_test_mapper(cfg: CfgNode) -> CheckedMapper:
    """Build Detectron2's mapper of test images. Keypoints, whose flips it would look up in DATASETS.TRAIN, are not read."""
    cfg = thawed(cfg)
    cfg.MODEL.KEYPOINT_ON = False
    return CheckedMapper(DatasetMapper(cfg, is_train=False))


def build_test_loader(
    cfg: CfgNode,
    dataset: str,
    mapper: Callable[[dict], dict] | None = None,
    *,
    skip_unusable: bool = False,
    **overrides: Any,
) -> DataLoader:
    """Build Detectron2's test loader for a dataset.

    Args:
        cfg: config; INPUT and DATALOADER are read.
        dataset: registered name.
        mapper: mapper used instead of Detectron2's DatasetMapper.
        skip_unusable: whether images that cannot be used are logged and left out of their batch, which may then be
            empty, instead of raising a DataError.
        overrides: arguments of `build_detection_test_loader` that replace those from the config, such as `num_workers`.
    """
    mapper = CheckedMapper(mapper) if mapper else build_test_mapper(cfg)
    if skip_unusable:
        mapper, overrides["collate_fn"] = _OrError(mapper), _without_errors
    return configure_workers(build_detection_test_loader(cfg, dataset, mapper=mapper, **overrides))


def resize_at_test(height: int, width: int, min_size: int, max_size: int) -> T.Transform:
    """Return the resize transform of an image for INPUT.MIN_SIZE_TEST (0: no resizing) and INPUT.MAX_SIZE_TEST.

    The shorter side is at least one pixel.
    """
    if min_size == 0:
        return T.NoOpTransform()
    size = T.ResizeShortestEdge.get_output_shape(height, width, min_size, max_size)
    return T.ResizeTransform(height, width, *(max(1, side) for side in size))
