"""Confusion of classes among the detections with at least a score."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...evaluation.coco import check_known
from .curves import match


def confusion_matrix(
    truth: dict[str, Any], detections: list[dict[str, Any]], score: float, iou: float = 0.5
) -> np.ndarray:
    """Count objects by annotated and detected class, for the detections with at least this score.

    The detections of an image, of all classes together, are matched in the order of their scores: each to the object, of
    any class, with which its IoU is largest among those with at least the IoU `iou` that no previous detection has. A
    detection for which there is none is counted as background, or not at all if it matches a crowd of any class as in
    COCO's evaluation. At most 100 detections per image are matched. A detection may thus take an object of another class
    in the same place: the diagonal is not the number of true detections, which are matched within each class.

    Args:
        truth: content of a COCO annotation file.
        detections: COCO results: image_id, category_id, bbox, score.

    Returns:
        (K + 1, K + 1) int: rows are the annotated classes by category id, and background; columns the detected classes,
        and missed objects. Background that is missed is 0.

    Raises:
        UserError: a detection has an unknown image or category.
    """
    check_known(detections, truth)
    rows = {category: row for row, category in enumerate(sorted(c["id"] for c in truth["categories"]))}
    other = len(rows)
    annotated = [rows[a["category_id"]] for a in truth["annotations"]]
    sure = [d for d in detections if d["score"] >= score]
    detected = [rows[d["category_id"]] for d in sure]
    of_one_class = ([{**entry, "category_id": 1} for entry in entries] for entries in (truth["annotations"], sure))
    matrix = np.zeros((other + 1, other + 1), int)
    for found in match(truth["images"], *of_one_class, [1], iou):
        for number, is_crowd, partner in zip(found["gtIds"], found["gtIgnore"], found["gtMatches"][0], strict=True):
            if not is_crowd:
                column = detected[int(partner) - 1] if partner > 0 else other
                matrix[annotated[int(number) - 1], column] += 1
        for number, is_ignored, partner in zip(
            found["dtIds"], found["dtIgnore"][0], found["dtMatches"][0], strict=True
        ):
            if not is_ignored and partner == 0:
                matrix[other, detected[int(number) - 1]] += 1
    return matrix
