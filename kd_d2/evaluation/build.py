"""Selection of the evaluator of a dataset."""

from __future__ import annotations

import importlib.util
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ..errors import UserError
from ..text import file_stem
from .coco_evaluator import CocoEvaluator
from .lvis_evaluator import LvisEvaluator
from .voc_evaluator import VocEvaluator

COCO_TYPES = ("coco", "coco_panoptic_seg")
EVALUATORS = {**dict.fromkeys(COCO_TYPES, CocoEvaluator), "pascal_voc": VocEvaluator, "lvis": LvisEvaluator}
"""Classes of evaluators by evaluator type."""
VOC_YEARS = (2007, 2012)


def check_evaluation(dataset_name: str) -> None:
    """Raise a UserError unless there is an evaluator and a metric for the dataset, and its package is installed."""
    metadata = MetadataCatalog.get(dataset_name)
    kind, year = metadata.get("evaluator_type"), metadata.get("year")
    if kind not in EVALUATORS:
        raise UserError(
            f"DATASETS.TEST names {dataset_name}, whose evaluator type {kind!r} is not coco, pascal_voc or lvis."
        )
    if kind == "lvis" and importlib.util.find_spec("lvis") is None:  # an optional dependency
        raise UserError(f"DATASETS.TEST names {dataset_name}, which needs the package lvis: pip install lvis")
    if kind == "pascal_voc" and year not in VOC_YEARS:
        raise UserError(
            f"DATASETS.TEST names {dataset_name}, a Pascal VOC dataset of the year {year}; register it with the year "
            "2007 (AP from 11 points of the curve) or 2012 (from its area)."
        )


def check_coco_metrics(dataset_name: str, analysis: str) -> None:
    """Raise a UserError, which begins with `analysis`, unless the dataset is evaluated with COCO metrics."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in COCO_TYPES:
        raise UserError(
            f"{analysis} needs COCO metrics, which {dataset_name} does not use (its evaluator type is {kind}); give the "
            "dataset as a COCO file in DATASETS.COCO_JSON."
        )


def metrics_of(dataset_name: str) -> dict[str, list[str]]:
    """Return the names of the metrics that an evaluation of the dataset can have, by task, such as AP and AP50 of bbox.

    Raises:
        UserError: see `check_evaluation`.
    """
    check_evaluation(dataset_name)
    return EVALUATORS[MetadataCatalog.get(dataset_name).evaluator_type].metrics(dataset_name)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """Build the evaluator of COCO, Pascal VOC or LVIS according to the metadata of the dataset.

    Args:
        output_folder: folder for the detections in JSON; by default OUTPUT_DIR/inference, or
            OUTPUT_DIR/inference/<dataset> if DATASETS.TEST names several datasets.

    Raises:
        UserError: see `check_evaluation`.
    """
    check_evaluation(dataset_name)
    if output_folder is None:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_folder = os.path.join(output_folder, file_stem(dataset_name))
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    if kind == "pascal_voc":
        return VocEvaluator(dataset_name)
    if kind == "lvis":
        return LvisEvaluator(dataset_name, output_dir=output_folder)
    return CocoEvaluator(dataset_name, output_folder, cfg.TEST.KEYPOINT_OKS_SIGMAS)
