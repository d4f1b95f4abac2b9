"""Class frequencies and box sizes of the training set, the priors of ICD's fake instances.

Shape suffixes: K classes, N boxes.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from torch import Tensor

from ...cache import cache_folder
from ...errors import UserError
from ...files import read_json, write_text
from ...image_files import size_of_entry

MIN_BOXES = 10
"""Classes with fewer boxes use the mean and deviation of all boxes."""

CLASS_OF_CATEGORY = "thing_dataset_id_to_contiguous_id"
"""Name of Detectron2's metadata with the class index of each category id; without it, classes are sorted by id."""

Priors = tuple[Tensor, Tensor, Tensor]
"""Frequencies (K,), and means (K, 2) and standard deviations (K, 2) of width and height as fractions of the image."""


def read_priors(datasets: tuple[str, ...], num_classes: int) -> Priors:
    """Return the priors of registered datasets. Those of annotation files are cached in the user's cache folder.

    Raises:
        UserError: there are no boxes.
    """
    cache = _cache_file(datasets, num_classes)
    if cache and os.path.isfile(cache):
        return tuple(torch.tensor(column) for column in read_json(cache))
    boxes = [_read_boxes(name, num_classes) for name in datasets]
    priors = compute_priors(*(np.concatenate(columns) for columns in zip(*boxes, strict=True)), num_classes)
    if not priors[0].sum():
        raise UserError(
            f"ICD draws fake instances like those of the training set, but DATASETS.TRAIN {', '.join(datasets)} has no boxes."
        )
    if cache:
        write_text(cache, json.dumps([column.tolist() for column in priors]))
    return priors


def compute_priors(classes_N: np.ndarray, sizes_N2: np.ndarray, num_classes: int) -> Priors:
    """
    Args:
        classes_N: int class of each box.
        sizes_N2: width and height of each box as fractions of its image.
    """
    counts = np.bincount(classes_N, minlength=num_classes)
    sums, squares = (
        np.stack([np.bincount(classes_N, values[:, side], num_classes) for side in (0, 1)], 1)
        for values in (sizes_N2, sizes_N2**2)
    )
    return priors_of_sums(*(torch.from_numpy(column).double() for column in (counts, sums, squares)))


def priors_of_sums(counts_K: Tensor, sums_K2: Tensor, squares_K2: Tensor) -> Priors:
    """
    Args:
        counts_K: boxes per class.
        sums_K2, squares_K2: sums of their widths and heights, and of the squares of these.
    """
    total, divisor_K1 = counts_K.sum().clamp(min=1), counts_K.clamp(min=1)[:, None]
    enough_K1 = (counts_K >= MIN_BOXES)[:, None]
    mean = torch.where(enough_K1, sums_K2 / divisor_K1, sums_K2.sum(0) / total)
    square = torch.where(enough_K1, squares_K2 / divisor_K1, squares_K2.sum(0) / total)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return counts_K.float(), mean.float(), deviation.float()


def _read_boxes(name: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return classes (N,) and sizes (N, 2) of a dataset's boxes, excluding crowds."""
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if json_file and os.path.isfile(json_file):
        with open(json_file) as file, _no_garbage_collection():
            coco = json.load(file)
        categories = sorted(category["id"] for category in coco.get("categories", ()))
        class_of = metadata.get(CLASS_OF_CATEGORY) or {category: number for number, category in enumerate(categories)}
        if len(categories) == num_classes and class_of.keys() >= set(categories):
            return _boxes_of_coco(coco, class_of)
    return _boxes_of_dicts(DatasetCatalog.get(name))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: with millions of new containers, it would take as long as reading the file."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _boxes_of_coco(coco: dict, class_of: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Read boxes directly from the JSON tree, in a fraction of the time that Detectron2's dictionaries take."""
    images = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    entries = [a for a in coco["annotations"] if not a.get("iscrowd")]
    boxes = np.array([a["bbox"] for a in entries], dtype=np.float64).reshape(-1, 4)
    extents = np.array([images[a["image_id"]] for a in entries], dtype=np.float64).reshape(-1, 2)
    classes = np.array([class_of[a["category_id"]] for a in entries], dtype=np.int64)
    return _visible(classes, boxes[:, :2], boxes[:, :2] + boxes[:, 2:], extents)


def _boxes_of_dicts(dicts: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    sized = zip(dicts, map(size_of_entry, dicts), strict=True)
    entries = [(a, size) for d, size in sized for a in d["annotations"] if not a.get("iscrowd")]
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a, _ in entries]
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    extents = np.array([size for _, size in entries], dtype=np.float64).reshape(-1, 2)
    classes = np.array([a["category_id"] for a, _ in entries], dtype=np.int64)
    return _visible(classes, boxes[:, :2], boxes[:, 2:], extents)


def _visible(
    classes: np.ndarray, low: np.ndarray, high: np.ndarray, extents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to the image and remove those without area."""
    sizes = (np.clip(high, 0, extents) - np.clip(low, 0, extents)) / extents
    keep = (sizes > 0).all(1)
    return classes[keep], sizes[keep]


def _cache_file(datasets: tuple[str, ...], num_classes: int) -> str | None:
    """Return the path of the cached priors of these files and class orders, or None if a dataset is not one file."""
    identity: list = [num_classes]
    for name in datasets:
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file")
        if not json_file or not os.path.isfile(json_file):
            return None
        status = os.stat(json_file)
        class_of = sorted((metadata.get(CLASS_OF_CATEGORY) or {}).items())
        identity.append((os.path.realpath(json_file), status.st_size, status.st_mtime_ns, class_of))
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    return os.path.join(cache_folder("icd-priors"), f"{digest}.json")
