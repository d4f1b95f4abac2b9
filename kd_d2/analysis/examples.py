"""Images for analyses that draw pictures: from the test set with ground truth, or from image files."""

from __future__ import annotations

import os
from itertools import islice

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T

from ..data import CheckedMapper, build_test_mapper
from ..errors import UserError
from ..files import check_inputs_are_kept, distinct_name
from ..text import file_stem


def read_examples(cfg: CfgNode, count: int) -> list[dict]:
    """Return the first images of the test set that have instances, mapped with ground truth at the test resolution.

    Raises:
        UserError: no image has instances.
    """
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a dataset, whose images are drawn.")
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    # Bitmaps, unlike polygons, can be made of all segmentations.
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=True, augmentations=[resize], instance_mask_format="bitmask"))
    entries = (
        d
        for d in DatasetCatalog.get(cfg.DATASETS.TEST[0])
        if any(not a.get("iscrowd") for a in d.get("annotations", ()))
    )
    examples = list(islice((example for example in map(mapper, entries) if len(example["instances"])), count))
    if not examples:
        raise UserError(f"The dataset {cfg.DATASETS.TEST[0]} has no image with objects.")
    return examples


def read_files(cfg: CfgNode, paths: list[str]) -> list[dict]:
    """Read image files at the test resolution, without ground truth.

    Raises:
        DataError: a file is missing or is not an image.
    """
    mapper = build_test_mapper(cfg)
    return [mapper({"file_name": path}) for path in paths]


def picture_name(example: dict) -> str:
    """Return the file name for a picture of an example."""
    return file_stem(os.path.splitext(os.path.basename(example["file_name"]))[0]) + ".png"


def picture_names(examples: list[dict], *folders: str) -> list[str]:
    """Return different file names for pictures of examples; equal names, from other folders, are numbered.

    Args:
        folders: those to which the pictures are written.

    Raises:
        UserError: a picture would overwrite the image of an example.
    """
    names: dict[str, None] = {}
    for example in examples:
        names[distinct_name(*os.path.splitext(picture_name(example)), names)] = None
    paths = (os.path.join(folder, name) for folder in folders for name in names)
    check_inputs_are_kept(paths, (example["file_name"] for example in examples))
    return list(names)


def pixels(example: dict, cfg: CfgNode) -> np.ndarray:
    """Return the image of an example as RGB (H, W, 3) uint8."""
    image = example["image"].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(image if cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1])
