"""Detectron2's LVIS evaluator with the released package lvis and current NumPy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.evaluation import LVISEvaluator

from ..files import named_in_errors
from .coco import AP_METRICS, PROPOSAL_METRICS, is_of_size

FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}


@contextlib.contextmanager
def numpy_with_float() -> Iterator[None]:
    """Provide np.float, which NumPy 1.24 has removed and lvis 0.5.3 uses."""
    if "float" in vars(np):
        yield
        return
    np.float = float  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.float  # type: ignore[attr-defined]


@contextlib.contextmanager
def missing_values_as_nan() -> Iterator[None]:
    """Let LVISEval return NaN for metrics without objects, which it marks with -1, as the COCO evaluation does."""
    import lvis

    class Evaluation(lvis.LVISEval):
        def get_results(self) -> dict[str, float]:
            return {metric: math.nan if value < 0 else value for metric, value in super().get_results().items()}

    original, lvis.LVISEval = lvis.LVISEval, Evaluation
    try:
        yield
    finally:
        lvis.LVISEval = original


class LvisEvaluator(LVISEvaluator):
    """LVIS evaluator whose results are NaN exactly where there are no objects."""

    @staticmethod
    def metrics(dataset_name: str) -> dict[str, list[str]]:
        """Return the names of the metrics that an evaluation can have, by task; they do not depend on the dataset."""
        return {task: [*AP_METRICS, *FREQUENCIES] for task in ("bbox", "segm")} | PROPOSAL_METRICS

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        with named_in_errors(self._output_dir):
            return super().evaluate()

    def _eval_predictions(self, predictions: list[dict[str, Any]]) -> None:
        with numpy_with_float(), missing_values_as_nan():
            super()._eval_predictions(predictions)
        if not any(prediction["instances"] for prediction in predictions):
            self._results = {task: self._of_no_detections(results) for task, results in self._results.items()}

    def _of_no_detections(self, results: dict[str, float]) -> dict[str, float]:
        """Replace Detectron2's NaN by 0 for metrics with objects, of which none is found."""
        frequency_of = {category: entry["frequency"] for category, entry in self._lvis_api.cats.items()}
        counted = [annotation for annotation in self._lvis_api.anns.values() if not annotation.get("ignore")]

        def has_objects(metric: str) -> bool:
            return any(
                is_of_size(metric, annotation["area"])
                and FREQUENCIES.get(metric) in (None, frequency_of[annotation["category_id"]])
                for annotation in counted
            )

        return {metric: 0.0 if has_objects(metric) else value for metric, value in results.items()}
