"""Figures of sample images with their annotated boxes, and the masks and keypoints that the detector is trained on."""

from __future__ import annotations

import os
import random

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints

from ..analysis.drawing import draw_instances, sheet, titled
from ..config import thawed
from ..data.augmentation import build_mapper
from ..data.coco import CocoData
from ..data.coco.segmentation import mask_of
from ..data.images import CheckedMapper
from ..image_files import DataError, read_image
from ..random_state import seeded
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
        drawn = (_draw(dataset, data, image) for image in _choose(data, count))
        rows += _rows([picture for picture in drawn if picture is not None])
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


def draw_augmented(sets: list[tuple[DataSet, CocoData]], cfg: CfgNode, count: int) -> np.ndarray | None:
    """Draw the images of `draw_samples` of the training sets, scaled and augmented as a training does, with their boxes.

    Polygons are augmented as bitmaps, which RLE masks require. Keypoints are left out.

    Returns:
        RGB (H, W, 3) uint8, or None if no image can be read.
    """
    cfg = thawed(cfg)
    cfg.MODEL.KEYPOINT_ON, cfg.INPUT.MASK_FORMAT = False, "bitmask"
    rows = []
    for dataset, data in sets:
        if dataset.role == "train":
            cfg.MODEL.MASK_ON = dataset.masks
            mapper = CheckedMapper(build_mapper(cfg))
            with seeded(0):
                augmented = [_augment(mapper, cfg.INPUT.FORMAT, dataset, data, image) for image in _choose(data, count)]
            rows += _rows([picture for picture in augmented if picture is not None])
    return sheet(rows) if rows else None


def _rows(pictures: list[np.ndarray]) -> list[list[np.ndarray]]:
    return [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]


def _draw(dataset: DataSet, data: CocoData, image: dict) -> np.ndarray | None:
    try:
        pixels = read_image(os.path.join(dataset.folder, image["file_name"]), "RGB")
    except DataError:  # reported as a finding
        return None
    annotations = [a for a in data.tree["annotations"] if a["image_id"] == image["id"]]
    names = {category["id"]: category["name"] for category in data.tree["categories"]}
    order = list(names)
    corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
    instances = Instances(pixels.shape[:2])
    instances.gt_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([order.index(a["category_id"]) for a in annotations], dtype=torch.int64)
    labels = [*names.values(), *(f"{name} (crowd)" for name in names.values())]
    instances.gt_classes += len(names) * torch.tensor([bool(a.get("iscrowd")) for a in annotations], dtype=torch.int64)
    if dataset.masks and annotations:
        instances.gt_masks = BitMasks(np.stack([mask_of(a["segmentation"], *pixels.shape[:2]) for a in annotations]))
    if dataset.keypoints and annotations and all("keypoints" in a for a in annotations):
        instances.gt_keypoints = Keypoints(np.stack([np.reshape(a["keypoints"], (-1, 3)) for a in annotations]))
    return _cell(pixels, instances, labels, f"{dataset.role}: {image['file_name']}")


def _augment(mapper: CheckedMapper, channels: str, dataset: DataSet, data: CocoData, image: dict) -> np.ndarray | None:
    names = {category["id"]: category["name"] for category in data.tree["categories"]}
    order = list(names)
    annotations = [
        {
            "bbox": list(map(float, annotation["bbox"])),  # those of ints would be resized to whole numbers
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": order.index(annotation["category_id"]),
            "iscrowd": annotation.get("iscrowd", 0),
            **({"segmentation": annotation["segmentation"]} if dataset.masks else {}),
        }
        for annotation in data.tree["annotations"]
        if annotation["image_id"] == image["id"]
    ]
    path = os.path.join(dataset.folder, image["file_name"])
    try:
        entry = mapper({"file_name": path, "annotations": annotations})
    except DataError:  # reported as a finding
        return None
    pixels = convert_image_to_rgb(entry["image"].permute(1, 2, 0), channels)
    return _cell(pixels, entry["instances"], list(names.values()), f"{dataset.role}: {image['file_name']}")


def _cell(pixels: np.ndarray, instances: Instances, labels: list[str], title: str) -> np.ndarray:
    """Draw annotations on an image that is scaled to CELL, with a title."""
    scale = min(CELL[0] / pixels.shape[1], CELL[1] / pixels.shape[0])
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    scaled = Instances(small.shape[:2], **{**instances.get_fields(), "gt_boxes": instances.gt_boxes.clone()})
    scaled.gt_boxes.scale(scale, scale)
    if scaled.has("gt_keypoints"):
        scaled.gt_keypoints = Keypoints(instances.gt_keypoints.tensor * torch.tensor([scale, scale, 1]))
    cell = np.full((CELL[1], CELL[0], 3), 255, np.uint8)
    left, top = (CELL[0] - size[0]) // 2, (CELL[1] - size[1]) // 2
    cell[top : top + size[1], left : left + size[0]] = draw_instances(small, scaled, labels, min_side=1)
    return titled(cell, title)
