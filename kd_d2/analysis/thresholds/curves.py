"""Precision, recall and F1 of detections over the score threshold, and the thresholds to choose from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UserError
from ...evaluation.coco import check_known, evaluate_boxes

LARGEST_F1 = "largest F1"


@dataclass
class OperatingPoint:
    """What a detector finds at a score threshold.

    Attributes:
        threshold: see `ThresholdCurve.at`.
        tp, fp, fn: true detections, false detections, missed objects.
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    tp: int
    fp: int
    fn: int

    @property
    def threshold_text(self) -> str:
        """The threshold with all its decimals, at least two."""
        return np.format_float_positional(self.threshold, min_digits=2)


@dataclass
class ThresholdCurve:
    """Numbers of true and false detections over the score threshold.

    Attributes:
        objects: number of objects, without crowds.
        scores: (T,) the different scores of the detections, the highest first.
        tp, fp: (T,) true and false detections with at least this score.
    """

    objects: int
    scores: np.ndarray
    tp: np.ndarray
    fp: np.ndarray

    @classmethod
    def of(cls, objects: int, scores: np.ndarray, is_true: np.ndarray) -> ThresholdCurve:
        """Return the curve of detections in any order; is_true (N,) has whether each is a true one."""
        values, ranks = np.unique(-scores, return_inverse=True)
        true, found = (np.cumsum(np.bincount(ranks, w, len(values)).astype(int)) for w in (is_true, None))
        return cls(objects, -values, true, found - true)

    @property
    def precision(self) -> np.ndarray:
        """(T,) share of the detections that are true."""
        return self.tp / (self.tp + self.fp)

    @property
    def recall(self) -> np.ndarray:
        """(T,) share of the objects that are found; NaN if there are none."""
        return self.tp / (self.objects or math.nan)

    @property
    def f1(self) -> np.ndarray:
        """(T,) harmonic mean of precision and recall; 0 if there are no objects."""
        return 2 * self.tp / (self.tp + self.fp + self.objects)

    def at(self, index: int) -> OperatingPoint:
        """Return the counts and measures of the detections with at least the score of this index.

        Its threshold is the score rounded down to as few decimals, at least two, as separate it from the next lower score,
        also in single precision and for detectors that keep only scores greater than the threshold.
        """
        lower = self.scores[index + 1] if index + 1 < len(self.scores) else 0.0
        tp, fp = int(self.tp[index]), int(self.fp[index])
        measures = (float(of[index]) for of in (self.precision, self.recall, self.f1))
        return OperatingPoint(rounded_down(self.scores[index], lower), *measures, tp, fp, self.objects - tp)

    def largest_f1(self) -> int | None:
        """Return the index of the largest F1, that of the highest score if there are several; None if no detection is true."""
        return int(self.f1.argmax()) if self.tp.any() else None

    def lowest_with_precision(self, precision: float) -> int | None:
        """Return the index of the lowest score with at least this precision, or None."""
        enough = np.flatnonzero(self.precision >= precision)
        return int(enough[-1]) if enough.size else None

    def highest_with_recall(self, recall: float) -> int | None:
        """Return the index of the highest score with at least this recall, or None."""
        enough = np.flatnonzero(self.recall >= recall)
        return int(enough[0]) if enough.size else None

    def points(self, precision: float | None = None, recall: float | None = None) -> dict[str, OperatingPoint | None]:
        """Return the point with the largest F1 and, if given, those for a precision and a recall; None if there is none."""
        chosen = {LARGEST_F1: self.largest_f1()}
        if precision is not None:
            chosen[f"precision >= {precision}"] = self.lowest_with_precision(precision)
        if recall is not None:
            chosen[f"recall >= {recall}"] = self.highest_with_recall(recall)
        return {criterion: None if index is None else self.at(index) for criterion, index in chosen.items()}

    def spread(self, count: int) -> list[int]:
        """Return at most `count` indices, the first and last among them, whose scores are spread over those of the curve."""
        if len(self.scores) <= count:
            return list(range(len(self.scores)))
        wanted = np.linspace(self.scores[0], self.scores[-1], count)
        return np.unique(np.searchsorted(-self.scores, -wanted, "right") - 1).tolist()


def rounded_down(score: float, lower: float) -> float:
    """Round a score down to as few decimals, at least two, as separate it from a lower score, also in single precision."""
    for decimals in range(2, 18):
        steps = math.floor(score * 10**decimals)
        for value in (steps / 10**decimals, (steps - 1) / 10**decimals):
            if lower < value <= score and lower <= float(np.float32(value)) < score:
                return value
    return min(math.nextafter(lower, 1), float(score))


def measure_thresholds(
    truth: dict[str, Any], detections: list[dict[str, Any]], iou: float = 0.5
) -> dict[str, ThresholdCurve]:
    """Return the curve of each class, by name.

    Detections are matched to the objects of their class with pycocotools: all areas, and 100 detections per image and class.
    Detections matched to a crowd are not counted.

    Args:
        truth: content of a COCO annotation file.
        detections: COCO results: image_id, category_id, bbox, score.

    Raises:
        UserError: a detection has an unknown image or category, or there are no objects.
    """
    check_objects(truth)
    check_known(detections, truth)
    categories = sorted(truth["categories"], key=lambda c: c["id"])
    matches = match(truth["images"], truth["annotations"], detections, [c["id"] for c in categories], iou)
    objects: dict[int, int] = dict.fromkeys((c["id"] for c in categories), 0)
    found: dict[int, list[tuple[float, bool]]] = {c["id"]: [] for c in categories}
    for of_image in matches:
        category = of_image["category_id"]
        objects[category] += int(np.sum(of_image["gtIgnore"] == 0))
        counted = ~of_image["dtIgnore"][0].astype(bool)
        is_true = of_image["dtMatches"][0] > 0
        scores = np.array(of_image["dtScores"], float)
        found[category] += zip(scores[counted].tolist(), is_true[counted].tolist(), strict=True)
    curves = {}
    for c in categories:
        scores, is_true = np.array(found[c["id"]], float).reshape(-1, 2).T
        curves[c["name"]] = ThresholdCurve.of(objects[c["id"]], scores, is_true)
    return curves


def pooled(curves: Iterable[ThresholdCurve]) -> ThresholdCurve:
    """Return the curve of all classes together, with the sums of their counts at each score."""
    curves = list(curves)
    scores = np.unique(np.concatenate([curve.scores for curve in curves]))[::-1]
    tp, fp = np.zeros(len(scores), int), np.zeros(len(scores), int)
    for curve in curves:
        reached = np.searchsorted(-curve.scores, -scores, "right")
        tp += np.concatenate([[0], curve.tp])[reached]
        fp += np.concatenate([[0], curve.fp])[reached]
    return ThresholdCurve(sum(curve.objects for curve in curves), scores, tp, fp)


def match(
    images: list[dict], annotations: list[dict], detections: list[dict], category_ids: list[int], iou: float
) -> list[dict[str, Any]]:
    """Return pycocotools' matches for objects of all areas, by image and class; for their numbers see `evaluate_boxes`."""
    evaluation = evaluate_boxes(images, annotations, detections, category_ids, (iou,))
    everything = evaluation.params.areaRng[0]
    return [found for found in evaluation.evalImgs if found is not None and found["aRng"] == everything]


def check_objects(truth: dict[str, Any]) -> None:
    """Raise a UserError if the annotations have no objects, not counting crowds."""
    if not any(not annotation.get("iscrowd") for annotation in truth.get("annotations", ())):
        raise UserError("The annotations have no objects: there is nothing to analyze.")
