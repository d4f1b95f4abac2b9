"""Images for the programs that draw: of the test set with their ground truth, or files of one's own."""

from __future__ import annotations

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from PIL import UnidentifiedImageError

from ..errors import UserError


def read_examples(cfg: CfgNode, count: int) -> list[dict]:
    """The first images of the test set that have instances, mapped with their ground truth at the test's size."""
    mapper = _mapper(cfg, with_truth=True)
    entries = (
        d for d in DatasetCatalog.get(cfg.DATASETS.TEST[0]) if any(not a.get("iscrowd") for a in d["annotations"])
    )
    return [mapper(entry) for entry, _ in zip(entries, range(count), strict=False)]


def read_files(cfg: CfgNode, paths: list[str]) -> list[dict]:
    """Image files, without ground truth, at the test's size.

    Raises:
        UserError: a file is not there or no image.
    """
    mapper = _mapper(cfg, with_truth=False)
    examples = []
    for path in paths:
        try:
            read_image(path)
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"--input: {path} cannot be read as an image: {error}.") from error
        examples.append(mapper({"file_name": path}))
    return examples


def _mapper(cfg: CfgNode, *, with_truth: bool) -> DatasetMapper:
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return DatasetMapper(cfg, is_train=with_truth, augmentations=[resize])


def pixels(example: dict, cfg: CfgNode) -> np.ndarray:
    """The image of an example as RGB (H, W, 3) uint8."""
    image = example["image"].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(image if cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1])
