"""Detectron2's COCO evaluator, accelerated by faster-coco-eval if it is installed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from itertools import chain
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from pycocotools.coco import COCO

from ..data.coco_json import registered_classes
from ..files import named_in_errors, write_json
from .coco import AP_METRICS, PROPOSAL_METRICS, complete, is_of_size

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

logger = logging.getLogger(__name__)


def faster_evaluation(truth: COCO, detections: COCO, task: str) -> COCOeval_faster:
    """Return faster-coco-eval's COCOeval, which has the same results and printed summary as pycocotools."""
    return COCOeval_faster(truth, detections, task, print_function=print)


def with_numbered_images(truth: COCO) -> tuple[COCO, dict[int | str, int]]:
    """Return annotations with images numbered from 1, and the numbers by id: faster-coco-eval stores ids as floats.

    Ids that are text, or above 2^53, are no such floats. The order of the images, which decides between equal scores, is
    that of pycocotools.
    """
    ids = sorted(truth.imgs, key=lambda image: (isinstance(image, str), image))
    number_of = {image: number for number, image in enumerate(ids, 1)}
    images = [{**image, "id": number_of[image["id"]]} for image in truth.dataset["images"]]
    annotations = [
        {**annotation, "image_id": number_of.get(annotation["image_id"])} for annotation in truth.dataset["annotations"]
    ]
    numbered = COCO()
    numbered.dataset = {**truth.dataset, "images": images, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        numbered.createIndex()
    return numbered, number_of


class CocoEvaluator(COCOEvaluator):
    """COCO evaluator for annotation files that may omit area and iscrowd, which pycocotools requires.

    Masks and keypoints are evaluated only if the annotations have them.

    Args:
        dataset_name: registered dataset.
        output_dir: folder for the detections in JSON.
        keypoint_sigmas: see TEST.KEYPOINT_OKS_SIGMAS.
    """

    def __init__(self, dataset_name: str, output_dir: str, keypoint_sigmas: Sequence[float] = ()):
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False, kpt_oks_sigmas=keypoint_sigmas)
        annotations = self._coco_api.anns.values()
        for annotation in annotations:
            annotation.update(complete(annotation))
        self._is_annotated = {
            "bbox": True,
            "segm": all(annotation.get("segmentation") for annotation in annotations),
            "keypoints": all("keypoints" in annotation for annotation in annotations),
        }

    @staticmethod
    def metrics(dataset_name: str) -> dict[str, list[str]]:
        """Return the names of the metrics that an evaluation can have, by task."""
        classes = registered_classes(dataset_name)
        of_classes = [f"AP-{name}" for name in classes.names] if classes and len(classes.names) > 1 else []
        of_keypoints = [metric for metric in AP_METRICS if metric != "APs"]
        tasks = {"bbox": AP_METRICS, "segm": AP_METRICS, "keypoints": of_keypoints}
        return {task: [*metrics, *of_classes] for task, metrics in tasks.items()} | PROPOSAL_METRICS

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, dict[str, float]] | None:
        with named_in_errors(self._output_dir):
            return super().evaluate(img_ids)

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> list[str]:
        predicted = super()._tasks_from_predictions(predictions)
        for task in predicted:
            if not self._is_annotated[task]:
                logger.info(f"The task {task} is not evaluated, since annotations of {self._metadata.name} lack it")
        return [task for task in predicted if self._is_annotated[task]]

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        """Sort the class names by category id, as Detectron2 assumes; a dataset may have the order of another one."""
        numbers = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if class_names and numbers and len(numbers) == len(class_names):
            class_names = [class_names[numbers[category]] for category in sorted(numbers)]
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        return results if coco_eval is not None else self._of_no_detections(results)

    def _of_no_detections(self, results: dict[str, float]) -> dict[str, float]:
        """Replace Detectron2's NaN by 0, which is COCO's AP of objects of which none is found."""
        areas = [annotation["area"] for annotation in self._coco_api.anns.values() if not annotation["iscrowd"]]
        return {
            metric: 0.0 if any(is_of_size(metric, area) for area in areas) else value
            for metric, value in results.items()
        }

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None) -> None:
        found = list(chain.from_iterable(prediction["instances"] for prediction in predictions))
        tasks = self._tasks or self._tasks_from_predictions(found)
        if COCOeval_faster is None or not found or not self._do_evaluation or "keypoints" in tasks:
            super()._eval_predictions(predictions, img_ids)
            return
        classes = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        category_of = {number: category for category, number in classes.items()}
        for detection in found:
            detection["category_id"] = category_of.get(detection["category_id"], detection["category_id"])
        write_json(os.path.join(self._output_dir, "coco_instances_results.json"), found, indent=None)
        logger.info(f"Evaluating {len(found)} detections with faster-coco-eval")
        truth, number_of = with_numbered_images(self._coco_api)
        found = [{**detection, "image_id": number_of.get(detection["image_id"])} for detection in found]
        numbers = None if img_ids is None else [number_of[image] for image in img_ids]
        for task in sorted(tasks):
            evaluation = _evaluate_predictions_on_coco(
                truth, found, task, cocoeval_fn=faster_evaluation, img_ids=numbers
            )
            self._results[task] = self._derive_coco_results(evaluation, task, self._metadata.get("thing_classes"))
