"""The evaluator that belongs to a data set."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator

from ..errors import UserError
from .coco_evaluator import CocoEvaluator


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """COCO's, Pascal VOC's or LVIS's evaluator, as the data set's metadata says.

    Args:
        output_folder: for the detections as json; by default OUTPUT_DIR/inference.

    Raises:
        UserError: the data set is evaluated in a way that has nothing to do with boxes.
    """
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind in ("coco", "coco_panoptic_seg"):
        return CocoEvaluator(dataset_name, output_folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_folder)
    raise UserError(
        f"DATASETS.TEST names {dataset_name}, whose evaluator type {kind!r} is none of coco, pascal_voc and lvis."
    )
