"""Images for checking and calibrating an export, in the input format of the exported file."""

from __future__ import annotations

import logging

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor

from ..config import thawed
from ..data import evenly_spaced, read_image, register_coco_json, register_synthetic
from ..data.coco.reader import MissingImagesError
from ..image_files import DataError
from .metadata import ExportMetadata

logger = logging.getLogger(__name__)


def dataset_files(cfg: CfgNode, split: str, count: int) -> list[str]:
    """Return the files of `count` images, evenly spaced over the first available dataset; [] if there is none.

    Args:
        cfg: config; the datasets of other splits need not exist.
        split: "TRAIN" or "TEST".
        count: number of images.
    """
    register_synthetic()
    cfg = thawed(cfg)
    names, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = cfg.DATASETS[split], (), ()
    cfg.MODEL.MASK_ON = False  # only the images are used
    for name in names:
        cfg.DATASETS[split] = (name,)
        try:
            register_coco_json(cfg)
            entries = DatasetCatalog.get(name)
        except (KeyError, OSError, AssertionError, MissingImagesError):
            continue
        return [entry["file_name"] for entry in evenly_spaced(entries, count)]
    return []


def dataset_images(cfg: CfgNode, split: str, count: int, metadata: ExportMetadata) -> list[Tensor]:
    """Load the images of `dataset_files`, without those that DATALOADER.SKIP_UNUSABLE_IMAGES allows to leave out."""
    images = []
    for path in dataset_files(cfg, split, count):
        try:
            images.append(prepared(path, metadata))
        except DataError as error:
            if not cfg.DATALOADER.SKIP_UNUSABLE_IMAGES:
                raise
            logger.warning(f"{error} It is left out.")
    return images


def prepared(path: str, metadata: ExportMetadata) -> Tensor:
    """Load an image file as a uint8 tensor [3, H, W], resized and padded."""
    image = read_image(path, metadata.input_format)
    resized = metadata.resize_transform(*image.shape[:2]).apply_image(image)
    return torch.from_numpy(metadata.padded(resized.transpose(2, 0, 1)))


def synthetic(metadata: ExportMetadata, count: int = 4) -> list[Tensor]:
    """Return noise images of several sizes; the last image is uniformly gray."""
    random = np.random.RandomState(0)
    side = metadata.min_size or 256  # 0: images are not resized
    images = []
    for number in range(count):
        height, width = metadata.fixed_size or random.randint(side // 2, side * 3 // 2, 2)
        cells = random.randint(0, 256, (3, -(-height // 8), -(-width // 8))).astype(np.uint8)
        noise = cells.repeat(8, 1).repeat(8, 2)[:, :height, :width]
        images.append(torch.from_numpy(np.full_like(noise, 127) if number == count - 1 else noise.copy()))
    return images
