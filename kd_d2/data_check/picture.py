"""A figure of sample images with their annotated boxes."""

from __future__ import annotations

import os
import random

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from ..analysis.drawing import draw_instances, sheet, titled
from ..data.coco import CocoData
from ..image_files import DataError, read_image
from .sets import DataSet

COLUMNS = 4
CELL = (400, 300)
"""Width and height of an image in the figure, px."""


def draw_samples(sets: list[tuple[DataSet, CocoData]], count: int) -> np.ndarray | None:
    """Draw images of each set with their boxes, covering as many classes as possible.

    Args:
        count: maximum number of images per set.

    Returns:
        RGB (H, W, 3) uint8, or None if no image can be read.
    """
    rows = []
    for dataset, data in sets:
        pictures = [p for p in (_draw(dataset, data, image) for image in _choose(data, count)) if p is not None]
        rows += [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
    return sheet(rows) if rows else None


def _choose(data: CocoData, count: int) -> list[dict]:
    """Choose images in a fixed random order: first those that add a class, then others with boxes, then the rest."""
    classes_of: dict[int, set[int]] = {image["id"]: set() for image in data.tree["images"]}
    for annotation in data.tree["annotations"]:
        classes_of[annotation["image_id"]].add(annotation["category_id"])
    images = sorted(data.tree["images"], key=lambda image: image["id"])
    random.Random(0).shuffle(images)
    shown: set[int] = set()
    adding = []
    for image in images:
        if classes_of[image["id"]] - shown:
            shown |= classes_of[image["id"]]
            adding.append(image)
    rest = [image for image in images if image not in adding]
    rest.sort(key=lambda image: not classes_of[image["id"]])
    return [*adding, *rest][:count]


def _draw(dataset: DataSet, data: CocoData, image: dict) -> np.ndarray | None:
    try:
        pixels = read_image(os.path.join(dataset.folder, image["file_name"]), "RGB")
    except DataError:  # reported as a finding
        return None
    scale = min(CELL[0] / pixels.shape[1], CELL[1] / pixels.shape[0])
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    annotations = [a for a in data.tree["annotations"] if a["image_id"] == image["id"]]
    names = {category["id"]: category["name"] for category in data.tree["categories"]}
    order = list(names)
    instances = Instances(small.shape[:2])
    corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
    instances.gt_boxes = Boxes(scale * torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([order.index(a["category_id"]) for a in annotations], dtype=torch.int64)
    labels = [*names.values(), *(f"{name} (crowd)" for name in names.values())]
    instances.gt_classes += len(names) * torch.tensor([bool(a.get("iscrowd")) for a in annotations], dtype=torch.int64)
    cell = np.full((CELL[1], CELL[0], 3), 255, np.uint8)
    left, top = (CELL[0] - size[0]) // 2, (CELL[1] - size[1]) // 2
    cell[top : top + size[1], left : left + size[0]] = draw_instances(small, instances, labels, min_side=1)
    return titled(cell, f"{dataset.role}: {image['file_name']}")
