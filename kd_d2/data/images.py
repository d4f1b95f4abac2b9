"""Images of datasets, read so that one that cannot be used is named."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, detection_utils
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from ..errors import UserError
from ..text import printable
from .workers import init_worker


class DataError(UserError):
    """An image of a dataset cannot be used."""

    def __init__(self, message: str):
        # A worker process hands its exception on as the text of a traceback, which ends with the sentence.
        super().__init__(message.rpartition(f"{__name__}.DataError: ")[2].strip())


IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
"""Pillow's names of the formats that are read; others, some of which start programs, are never opened."""

READING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, SizeMismatchError)
"""What Pillow's readers and Detectron2 raise at a damaged image."""

Content = TypeVar("Content")


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Pillow's Image.open, of IMAGE_FORMATS alone, whatever the file's suffix says."""
    with PathManager.open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
        yield image


def read_checked(path: str, read: Callable[[], Content]) -> Content:
    """What a function makes of an image file; of a JPEG that lacks its end, what is there is read, with a warning.

    Args:
        path: the file that `read` is going to read with Pillow.
        read: called again where the end is missing.

    Raises:
        DataError: the file is not there, is not one of IMAGE_FORMATS, damaged, or too large or too narrow.
    """
    try:
        with open_image(path) as image:
            is_jpeg = image.format in ("JPEG", "MPO")
        try:
            return read()
        except OSError as error:
            if not is_jpeg or "truncated" not in str(error):
                raise
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            content = read()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
        message = f"The image {printable(path)} is truncated; what is left of it is used, the rest is gray."
        log_first_n(logging.WARNING, message, name=__name__, key="message")
        return content
    except READING_ERRORS as error:
        raise DataError(f"The image {path} cannot be used: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is none of {', '.join(IMAGE_FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; write it smaller"
    if "must be > 0" in str(error):  # Pillow, asked to resize to that
        return "it is so narrow that its shorter side is less than a pixel when it is resized"
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def read_image(path: str, channels: str) -> np.ndarray:
    """Detectron2's `read_image` as `read_checked`.

    Args:
        channels: order of the channels, such as "BGR".

    Returns:
        Height x width x channels.

    Raises:
        DataError: see `read_checked`.
    """
    return read_checked(path, lambda: detection_utils.read_image(path, channels))


class CheckedMapper:
    """A mapper that names the file of an image that cannot be used.

    Args:
        mapper: of dataset dictionaries, as Detectron2's DatasetMapper.
    """

    def __init__(self, mapper: Callable[[dict], Any]):
        self.mapper = mapper

    def __call__(self, entry: dict) -> Any:
        """What the mapper makes of the entry.

        Raises:
            DataError: see `read_checked`; or the image has another size than its annotations say.
        """
        if "file_name" not in entry:
            return self.mapper(entry)
        return read_checked(entry["file_name"], lambda: self.mapper(entry))


def build_test_loader(
    cfg: CfgNode, dataset: str, mapper: Callable[[dict], dict] | None = None, **overrides: Any
) -> DataLoader:
    """Detectron2's loader of a test set.

    Args:
        cfg: INPUT and DATALOADER are read.
        dataset: its name.
        mapper: replaces Detectron2's DatasetMapper.
        overrides: of what `build_detection_test_loader` takes from the config, such as `num_workers`.
    """
    mapper = CheckedMapper(mapper or DatasetMapper(cfg, is_train=False))
    loader = build_detection_test_loader(cfg, dataset, mapper=mapper, **overrides)
    loader.worker_init_fn = init_worker
    return loader


def resize_at_test(height: int, width: int, min_size: int, max_size: int) -> T.Transform:
    """How an image of this size is resized for INPUT.MIN_SIZE_TEST (0: not at all) and MAX_SIZE_TEST."""
    if min_size == 0:
        return T.NoOpTransform()
    return T.ResizeTransform(height, width, *T.ResizeShortestEdge.get_output_shape(height, width, min_size, max_size))
