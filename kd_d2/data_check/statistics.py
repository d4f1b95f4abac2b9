"""Dataset statistics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..data.coco import CocoData

AREAS = (32**2, 96**2)
"""COCO's area thresholds between small, medium and large objects, px^2."""
PERCENTILES = (0, 5, 50, 95, 100)


@dataclass
class ClassCounts:
    """Counts of a class by COCO's object sizes, without crowds.

    Attributes:
        small, medium, large: number of boxes with an area below 32^2, below 96^2, and of at least 96^2 px^2.
        images: number of images with a box of the class.
    """

    name: str
    small: int
    medium: int
    large: int
    images: int

    @property
    def boxes(self) -> int:
        return self.small + self.medium + self.large


@dataclass
class SetStatistics:
    """Statistics of a dataset.

    Attributes:
        images, empty: number of images, and number of images without annotations.
        boxes, crowds: number of annotations with iscrowd 0 and 1.
        classes: counts by class, sorted by category id.
        percentiles: values at PERCENTILES of image width and height, boxes per image, box side (square root of
            width * height, px) and box aspect ratio (width / height), by name.
        image_sizes: the most frequent image sizes, each as width, height and count.
    """

    images: int
    empty: int
    boxes: int
    crowds: int
    classes: list[ClassCounts]
    percentiles: dict[str, list[float]]
    image_sizes: list[list[int]]


def measure(data: CocoData) -> SetStatistics:
    """Compute the statistics of a dataset."""
    images = data.tree["images"]
    objects = [a for a in data.tree["annotations"] if not a.get("iscrowd")]
    bboxes = np.array([a["bbox"] for a in objects], dtype=float).reshape(-1, 4)
    areas = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in objects], dtype=float)
    labels = np.array([a["category_id"] for a in objects], dtype=np.int64)
    owners = np.array([a["image_id"] for a in objects], dtype=np.int64)
    sizes = np.searchsorted(AREAS, areas, side="right")
    classes = []
    for category in data.tree["categories"]:
        own = labels == category["id"]
        small, medium, large = (int((sizes[own] == size).sum()) for size in range(3))
        classes.append(ClassCounts(category["name"], small, medium, large, len(np.unique(owners[own]))))
    boxes_of = Counter(owners.tolist())
    measured = {
        "image width": [image["width"] for image in images],
        "image height": [image["height"] for image in images],
        "boxes an image": [boxes_of[image["id"]] for image in images],
        "side of a box": np.sqrt(bboxes[:, 2] * bboxes[:, 3]),
        "width / height of a box": bboxes[:, 2] / bboxes[:, 3],
    }
    return SetStatistics(
        images=len(images),
        empty=len(images) - len({a["image_id"] for a in data.tree["annotations"]}),
        boxes=len(objects),
        crowds=len(data.tree["annotations"]) - len(objects),
        classes=classes,
        percentiles={name: np.percentile(v, PERCENTILES).tolist() for name, v in measured.items() if len(v)},
        image_sizes=[[*size, n] for size, n in Counter((i["width"], i["height"]) for i in images).most_common(3)],
    )
