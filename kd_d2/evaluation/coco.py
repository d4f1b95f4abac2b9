"""COCO evaluation of annotations and detections in memory, without printing."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import UserError

MAX_DETECTIONS = 100
SIZES = {"APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, math.inf)}
AP_METRICS = ("AP", "AP50", "AP75", *SIZES)
"""Metrics of boxes and masks in COCO and LVIS."""
PROPOSAL_METRICS = {"box_proposals": [f"AR{size}@{limit}" for limit in (100, 1000) for size in ("", "s", "m", "l")]}


def is_of_size(metric: str, area: float) -> bool:
    """Return whether an object of this area counts for the metric."""
    low, high = SIZES.get(metric, (0, math.inf))
    return low <= area <= high


def check_known(detections: list[dict[str, Any]], truth: dict[str, Any]) -> None:
    """Raise a UserError if the image or the category of a detection is not in the annotations."""
    for key, known in (("image_id", "images"), ("category_id", "categories")):
        ids = {entry["id"] for entry in truth[known]}
        for detection in detections:
            if detection.get(key) not in ids:
                raise UserError(f"A detection has the {key} {detection.get(key)!r}, which is not among the {known}.")


def complete(annotation: dict[str, Any]) -> dict[str, Any]:
    """Return the annotation with fields that files may omit but pycocotools needs."""
    width, height = annotation["bbox"][2:]
    added = {"area": width * height, "iscrowd": 0}
    if "keypoints" in annotation:
        added["num_keypoints"] = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
    return {**added, **annotation}


def evaluate_boxes(
    images: list[dict],
    annotations: list[dict],
    detections: list[dict],
    category_ids: list[int],
    thresholds: tuple[float, ...],
) -> COCOeval:
    """Evaluate these categories at these IoU thresholds with pycocotools, without accumulating the results.

    Annotations are numbered from 1 in the order of the list, as are detections; at most 100 of an image and class count.
    """
    numbered = [{**complete(a), "id": number} for number, a in enumerate(annotations, 1)]  # pycocotools: 0 is no match
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        categories = [{"id": category_id} for category_id in category_ids]
        truth.dataset = {"images": images, "categories": categories, "annotations": numbered}
        truth.createIndex()
        if detections:
            found = truth.loadRes(copy.deepcopy(detections))
        else:
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.catIds = list(category_ids)
        evaluation.params.iouThrs = np.array(thresholds)
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
    return evaluation


def found_objects(
    truth: dict[str, Any], detections: list[dict[str, Any]], score: float, overlap: float = 0.5
) -> set[int]:
    """Return ids of the annotations found by detections of their class with at least this score and IoU (one each)."""
    check_known(detections, truth)
    sure = [detection for detection in detections if detection["score"] >= score]
    ids = [c["id"] for c in truth["categories"]]
    evaluation = evaluate_boxes(truth["images"], truth["annotations"], sure, ids, (overlap,))
    everything = evaluation.params.areaRng[0]
    return {
        truth["annotations"][number - 1]["id"]
        for of_image in evaluation.evalImgs
        if of_image is not None and of_image["aRng"] == everything
        for number, match, is_crowd in zip(
            of_image["gtIds"], of_image["gtMatches"][0], of_image["gtIgnore"], strict=True
        )
        if match > 0 and not is_crowd
    }
