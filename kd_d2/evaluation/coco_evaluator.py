"""Detectron2's COCO evaluator, its precision and recall counted by faster-coco-eval where that is installed."""

from __future__ import annotations

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None


def faster_evaluation(truth: COCO, detections: COCO, kind: str) -> COCOeval_faster:
    """faster-coco-eval's COCOeval, whose summary is printed as pycocotools' is. The numbers are pycocotools' too."""
    return COCOeval_faster(truth, detections, kind, print_function=print)


if COCOeval_faster is not None:
    coco_evaluation.COCOeval_opt = faster_evaluation  # the place that Detectron2 keeps for a fast implementation


class CocoEvaluator(COCOEvaluator):
    """Takes annotation files that leave out what pycocotools cannot do without: area and iscrowd."""

    def __init__(self, dataset_name: str, output_dir: str):
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=COCOeval_faster is not None)
        for annotation in self._coco_api.anns.values():
            width, height = annotation["bbox"][2:]
            annotation.setdefault("area", width * height)
            annotation.setdefault("iscrowd", 0)
