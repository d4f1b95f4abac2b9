"""Images for the programs that draw: of the test set with their ground truth, or files of one's own."""

from __future__ import annotations

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T

from ..data import CheckedMapper


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
        DataError: a file is not there or no image.
    """
    mapper = _mapper(cfg, with_truth=False)
    return [mapper({"file_name": path}) for path in paths]


def _mapper(cfg: CfgNode, *, with_truth: bool) -> CheckedMapper:
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return CheckedMapper(DatasetMapper(cfg, is_train=with_truth, augmentations=[resize]))


def pixels(example: dict, cfg: CfgNode) -> np.ndarray:
    """The image of an example as RGB (H, W, 3) uint8."""
    image = example["image"].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(image if cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1])
