"""Dataset mappers whose errors name the file, and test loaders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, detection_utils
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from torch.utils.data import DataLoader

from ..config import thawed
from ..image_files import READING_ERRORS, DataError, read_checked
from .workers import configure_workers

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry")


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
