"""The datasets to check."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY

from ..class_names import ClassCount
from ..config import load_config, read_config, reads_annotations
from ..config_files import find_config_file, find_file
from ..data import register_synthetic
from ..data.coco_json import check_name
from ..errors import UserError


@dataclass(frozen=True)
class DataSet:
    """A dataset to check.

    Attributes:
        role: "train" or "test".
        name: name for tables and messages.
        json_file, folder: annotation file in COCO format, and folder of the images.
        annotated: whether the annotations are used.
        masks: whether each object needs a segmentation.
        polygons: whether these have to be polygons, not run-length encoded (RLE).
        keypoints: number of keypoints that the detector predicts; 0 if it predicts none.
    """

    role: str
    name: str
    json_file: str
    folder: str
    annotated: bool = True
    masks: bool = False
    polygons: bool = False
    keypoints: int = 0


def config_to_check(config_file: str, opts: list[Any]) -> CfgNode:
    """Return the config of the student or plain detector; teacher, weights and data need not exist."""
    return load_config(config_file, opts, student_only=True, needs_data=False, needs_weights=False)


def sets_of_config(config_file: str, opts: list[Any]) -> tuple[list[DataSet], bool]:
    """Return the sets of DATASETS.TRAIN and TEST, and DATALOADER.SKIP_UNUSABLE_IMAGES; teacher and weights need not exist.

    Raises:
        UserError: the config cannot be read, or a set is missing or not in COCO format, or has the name of another one.
    """
    cfg = config_to_check(config_file, opts)
    trains_on_annotations = reads_annotations(read_config(config_file, opts))
    register_synthetic()
    base = os.path.dirname(find_config_file(config_file, "the config"))
    entries = {name: (json_file, folder) for name, json_file, folder in cfg.DATASETS.COCO_JSON}
    sets = []
    for role in ("train", "test"):
        for name in cfg.DATASETS[role.upper()]:
            json_file, folder = entries.get(name) or _built_in(role.upper(), name)
            key = f"DATASETS.COCO_JSON ({name})"
            json_file, folder = find_file(json_file, key, base), find_file(folder, key, base, is_folder=True)
            if name in entries:
                check_name(name, json_file)
            annotated = role == "test" or trains_on_annotations
            masks = cfg.MODEL.MASK_ON and annotated
            polygons = masks and role == "train" and cfg.INPUT.MASK_FORMAT == "polygon"
            keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON and annotated else 0
            sets.append(DataSet(role, name, json_file, folder, annotated, masks, polygons, keypoints))
    if not sets:
        raise UserError(f"{config_file}: DATASETS.TRAIN and DATASETS.TEST are empty: name a dataset.")
    return sets, cfg.DATALOADER.SKIP_UNUSABLE_IMAGES


def class_count_of_config(config_file: str, opts: list[Any]) -> ClassCount | None:
    """Return the number of classes that the config's detector, or student, predicts, or None if its key is not known."""
    cfg = config_to_check(config_file, opts)
    return ClassCount.in_config(cfg, META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE))


def _built_in(key: str, name: str) -> tuple[str, str]:
    metadata = MetadataCatalog.get(name)
    files = metadata.get("json_file"), metadata.get("image_root")
    if None in files:
        raise UserError(
            f"DATASETS.{key} names {name!r}, which is neither an entry of DATASETS.COCO_JSON nor a built-in set in COCO's format."
        )
    return files
