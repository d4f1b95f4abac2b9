"""Error types as precision-recall curves, the analysis of the COCO detection challenge.

See Hoiem et al. 2012 and figures 10 and 11 of the thesis. Each class has seven curves. Each curve ignores more errors
than the previous one; the area between two curves is the cost of an error type.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UserError
from ...evaluation.coco import check_known, evaluate_boxes
from ..base import nanmean

STAGES = ("C75", "C50", "Loc", "Sim", "Oth", "BG", "FN")
"""IoU 0.75; 0.5; 0.1; then ignoring confusions within the super-category; with any class; with background; misses."""
SIZES = ("all", "small", "medium", "large")
RECALLS = np.linspace(0, 1, 101)
LOCALIZATION_IOU = 0.1


@dataclass
class ErrorCurves:
    """Precision at the recalls `RECALLS`.

    Attributes:
        class_names: names of the K classes.
        precision: (K, 4, 7, 101) by class, size, stage and recall; NaN if the class has no object of the size.
    """

    class_names: list[str]
    precision: np.ndarray

    @property
    def overall(self) -> np.ndarray:
        """Mean over the classes that have objects, (4, 7, 101)."""
        return nanmean(self.precision, 0)

    def areas(self, name: str | None = None) -> dict[str, dict[str, float]]:
        """Return the area under each curve by size and stage, for a class or overall."""
        curves = self.overall if name is None else self.precision[self.class_names.index(name)]
        return {
            size: {stage: float(area) for stage, area in zip(STAGES, of_size, strict=True)}
            for size, of_size in zip(SIZES, curves.mean(-1), strict=True)
        }


def analyze_errors(
    truth: dict[str, Any],
    detections: list[dict[str, Any]],
    supercategories: dict[int, str] | None = None,
    workers: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> ErrorCurves:
    """Compute the curves of detections.

    Args:
        truth: content of a COCO annotation file.
        detections: COCO results: image_id, category_id, bbox, score.
        supercategories: by category id; defaults to the annotation file's. A class without one is similar to no other.
        workers: number of processes.
        progress: wraps the iterable of finished classes, for a progress bar.

    Raises:
        UserError: a detection has an unknown image or category, the annotations have no images or categories, or a
            process was killed.
    """
    categories = sorted(truth.get("categories", ()), key=lambda c: c["id"])
    if not categories or not truth.get("images"):
        raise UserError("The annotations have no categories or no images: there is nothing to analyze.")
    check_known(detections, truth)
    if supercategories is None:
        supercategories = supercategories_of(categories)
    similar = {
        c["id"]: {
            other["id"]
            for other in categories
            if c["id"] in supercategories and supercategories.get(other["id"]) == supercategories[c["id"]]
        }
        for c in categories
    }
    of_class: dict[int, list[dict]] = {c["id"]: [] for c in categories}
    for detection in detections:
        of_class[detection["category_id"]].append(detection)
    jobs = [(c["id"], of_class[c["id"]], similar[c["id"]]) for c in categories]
    curves: dict[int, np.ndarray] = {}
    if workers == 1:
        for job in progress(jobs):
            curves[job[0]] = _class_curves(truth, *job)
    else:
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(workers, mp_context=context, initializer=_remember, initargs=(truth,)) as pool:
                futures = {pool.submit(_curves_in_worker, *job): job[0] for job in jobs}
                for future in progress(as_completed(futures)):
                    curves[futures[future]] = future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers is {workers}, and one of these processes was killed, most likely because the machine ran out of memory; use fewer."
            ) from error
    return ErrorCurves([c["name"] for c in categories], np.stack([curves[c["id"]] for c in categories]))


def supercategories_of(categories: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Return the super-categories by category id; many tools write "none" for a category without one."""
    return {c["id"]: c["supercategory"] for c in categories if c.get("supercategory") not in (None, "", "none")}


_truth: dict[str, Any] = {}
"""The annotations in each worker process, sent once instead of with every class."""


def _remember(truth: dict[str, Any]) -> None:
    _truth.update(truth)


def _curves_in_worker(*job: Any) -> np.ndarray:
    return _class_curves(_truth, *job)


def _class_curves(truth: dict[str, Any], category_id: int, detections: list[dict], similar: set[int]) -> np.ndarray:
    """Return the curves of a class (4, 7, 101)."""
    own = _precision(truth, category_id, detections, set(), (0.75, 0.5, LOCALIZATION_IOU))
    everything = {c["id"] for c in truth["categories"]}
    (similar_ignored,) = _precision(truth, category_id, detections, similar, (LOCALIZATION_IOU,))
    (others_ignored,) = _precision(truth, category_id, detections, everything, (LOCALIZATION_IOU,))
    background_ignored = np.where(np.isnan(others_ignored), np.nan, others_ignored > 0)
    nothing_missed = np.where(np.isnan(others_ignored), np.nan, 1.0)
    return np.stack([*own, similar_ignored, others_ignored, background_ignored, nothing_missed], 1)


def _precision(
    truth: dict[str, Any],
    category_id: int,
    detections: list[dict],
    ignored: set[int],
    thresholds: tuple[float, ...],
) -> np.ndarray:
    """Return the precision of a class (thresholds, 4, 101), ignoring detections of objects of the `ignored` classes."""
    annotations = []
    for annotation in truth["annotations"]:
        if annotation["category_id"] == category_id:
            annotations.append(annotation)
        elif annotation["category_id"] in ignored:
            annotations.append({**annotation, "category_id": category_id, "iscrowd": 1, "ignore": 1})
    evaluation = evaluate_boxes(truth["images"], annotations, detections, [category_id], thresholds)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision_TRA = evaluation.eval["precision"][:, :, 0, :, 0]
    return np.where(precision_TRA < 0, np.nan, precision_TRA).transpose(0, 2, 1)
