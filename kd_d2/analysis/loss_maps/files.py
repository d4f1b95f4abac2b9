"""Files of a training with loss maps: the images with their objects, and the records."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from ...errors import UserError
from ...files import atomic_write
from ..examples import pixels

Example = tuple[np.ndarray, Instances]

FOLDER = "loss_maps"
EXAMPLES = "examples.npz"


def save_examples(examples: list[dict], cfg: CfgNode) -> None:
    """Save the images and their objects next to the loss maps, for `draw_loss_maps`."""
    arrays = {"classes": np.array(MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes)}
    for number, example in enumerate(examples):
        arrays[f"{number}/image"] = pixels(example, cfg)
        arrays[f"{number}/boxes"] = example["instances"].gt_boxes.tensor.numpy()
        arrays[f"{number}/labels"] = example["instances"].gt_classes.numpy()
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, FOLDER, EXAMPLES), "wb") as file:
        np.savez(file, **arrays)


def read_saved_examples(output: str) -> tuple[list[Example], list[str]]:
    """Return RGB images (H, W, 3) with their ground truth, and the class names."""
    with np.load(os.path.join(output, FOLDER, EXAMPLES)) as arrays:
        examples = []
        while f"{len(examples)}/image" in arrays:
            number = len(examples)
            image = arrays[f"{number}/image"]
            truth = Instances(image.shape[:2], gt_boxes=Boxes(torch.from_numpy(arrays[f"{number}/boxes"])))
            truth.gt_classes = torch.from_numpy(arrays[f"{number}/labels"])
            examples.append((image, truth))
        return examples, arrays["classes"].tolist()


def are_equal(first: list[Example], second: list[Example]) -> bool:
    """Return whether two trainings were recorded on the same images and boxes."""
    return len(first) == len(second) and all(
        np.array_equal(ours, theirs) and torch.equal(truth.gt_boxes.tensor, other.gt_boxes.tensor)
        for (ours, truth), (theirs, other) in zip(first, second, strict=True)
    )


def record_files(folder: str) -> list[str]:
    """Return the paths of the records in a folder."""
    return glob.glob(os.path.join(glob.escape(folder), "iteration_*.npz"))


def mean_loss_maps(output: str) -> tuple[dict[str, np.ndarray], int]:
    """Return the mean of a training's records by "<image>/<stride>", and the number of records.

    Raises:
        UserError: there are no records.
    """
    paths = record_files(os.path.join(output, FOLDER))
    if not paths:
        raise UserError(f"{output} has no {FOLDER}: name the config, and kd-d2 analyze loss-maps trains and records.")
    total: dict[str, np.ndarray] = {}
    for path in paths:
        with np.load(path) as maps:
            for name, level in maps.items():
                total[name] = total.get(name, 0) + level.astype(np.float64)
    return {name: level / len(paths) for name, level in total.items()}, len(paths)


def recorded_strides(maps: Iterable[str]) -> set[int]:
    """Return the strides in names "<image>/<stride>"."""
    return {int(name.split("/")[1]) for name in maps}


def check_stride(stride: int, strides: Collection[int], whose: str) -> None:
    """Raise a UserError if the stride to draw is not among those of the levels."""
    if stride not in strides:
        raise UserError(f"{whose} has no level of stride {stride}; its strides are {sorted(strides)}.")
