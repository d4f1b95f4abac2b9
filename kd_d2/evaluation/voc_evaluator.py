"""Detectron2's Pascal VOC evaluator, averaged over the classes that have objects."""

from __future__ import annotations

import logging
import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

THRESHOLDS = [percent / 100 for percent in range(50, 100, 5)]


@dataclass
class Objects:
    """Objects of one class on one image."""

    boxes: list[list[float]] = field(default_factory=list)
    are_difficult: list[bool] = field(default_factory=list)


class VocEvaluator(PascalVOCDetectionEvaluator):
    """Pascal VOC evaluator for test sets that do not have objects of every class.

    Classes whose objects are all difficult, or that have none, have no AP and are left out of the mean. Annotations may
    omit pose, truncated and difficult, which is 1 or true in difficult objects, and coordinates may be fractions.
    """

    @staticmethod
    def metrics(dataset_name: str) -> dict[str, list[str]]:
        """Return the names of the metrics of an evaluation, by task; they do not depend on the dataset."""
        return {"bbox": ["AP", "AP50", "AP75"]}

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        logger.info(f"Evaluating {self._dataset_name} with the metric of VOC {2007 if self._is_2007 else 2012}")
        objects, average_precisions, left_out = self._read_objects(), [], []
        for number, name in enumerate(self._class_names):
            if all(all(of_image.are_difficult) for of_image in objects[name].values()):
                left_out.append(name)
                continue
            lines = [line for of_rank in gathered for line in of_rank.get(number, [])]
            curves = recall_and_precision(lines, objects[name])
            average_precisions.append([100 * voc_ap(*curve, self._is_2007) for curve in curves])
        if left_out:
            logger.info(
                f"Left out of the mean over classes, since {self._dataset_name} has no objects of them that are not "
                f"difficult: {', '.join(left_out)}"
            )
        means = np.mean(average_precisions, axis=0).tolist() if average_precisions else [math.nan] * len(THRESHOLDS)
        of_threshold = dict(zip(THRESHOLDS, means, strict=True))
        return {"bbox": {"AP": float(np.mean(means)), "AP50": of_threshold[0.5], "AP75": of_threshold[0.75]}}

    def _read_objects(self) -> dict[str, dict[str, Objects]]:
        """Return the objects of the test set by class and image."""
        objects: dict[str, dict[str, Objects]] = defaultdict(lambda: defaultdict(Objects))
        with PathManager.open(self._image_set_path) as file:
            images = [line.strip() for line in file if line.strip()]
        for image in images:
            with PathManager.open(self._anno_file_template.format(image)) as file:
                tree = ElementTree.parse(file)
            for entry in tree.findall("object"):
                of_image = objects[entry.findtext("name", "")][image]
                of_image.boxes.append(
                    [float(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
                )
                difficult = entry.findtext("difficult") or ""
                of_image.are_difficult.append(difficult.strip().lower() in ("1", "true"))
        return objects


def recall_and_precision(lines: list[str], objects: dict[str, Objects]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield recall and precision at each of THRESHOLDS.

    Args:
        lines: detections of a class, as "image score xmin ymin xmax ymax"; those with equal scores keep their order.
        objects: objects of the class by image, at least one of which is not difficult.
    """
    split = [line.rsplit(" ", 5) for line in lines]
    order = np.argsort([-float(score) for _, score, *_ in split], kind="stable")
    detections = [_nearest(split[i][0], np.array(split[i][2:], dtype=float), objects) for i in order]
    total = sum(of_image.are_difficult.count(False) for of_image in objects.values())
    for threshold in THRESHOLDS:
        right, wrong, found = np.zeros(len(detections)), np.zeros(len(detections)), set()
        for i, (image, overlap, nearest) in enumerate(detections):
            if overlap <= threshold:
                wrong[i] = 1
            elif not objects[image].are_difficult[nearest]:
                (wrong if (image, nearest) in found else right)[i] = 1
                found.add((image, nearest))
        right, wrong = right.cumsum(), wrong.cumsum()
        yield right / total, right / np.maximum(right + wrong, np.finfo(np.float64).eps)


def _nearest(image: str, box: np.ndarray, objects: dict[str, Objects]) -> tuple[str, float, int]:
    """Return the image, the greatest overlap (IoU) of the box with its objects, and the number of that object."""
    if image not in objects:
        return image, -math.inf, -1
    boxes = np.array(objects[image].boxes)
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    common = (high - low + 1).clip(0).prod(1)
    overlaps = common / ((box[2:] - box[:2] + 1).prod() + (boxes[:, 2:] - boxes[:, :2] + 1).prod(1) - common)
    return image, overlaps.max(), overlaps.argmax().item()
