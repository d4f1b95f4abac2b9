"""COCO-format data by config: DATASETS.COCO_JSON registered, and looked at before anything relies on it."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..config import reads_annotations
from ..errors import UserError

logger = logging.getLogger(__name__)

LARGEST = 1e9  # px; no image is larger


@dataclass
class CocoSummary:
    """What `check_coco_json` counted.

    Attributes:
        images, boxes: how many there are.
        classes: names in order of category id.
        boxes_without_area: boxes whose width or height is not above 0; training drops them.
        boxes_out_of_range: boxes that reach more than one pixel beyond their image; training clips them.
        zero_ids: annotations with id 0, which pycocotools counts as missed even when they are found.
    """

    images: int
    boxes: int
    classes: list[str]
    boxes_without_area: int = 0
    boxes_out_of_range: int = 0
    zero_ids: int = 0


def register_coco_json(cfg: CfgNode) -> None:
    """Register the entries of DATASETS.COCO_JSON that TRAIN or TEST names, after checking their files.

    Of those that only train with pseudo-labels, images alone are read.

    Raises:
        UserError: see `check_coco_json`; or the name belongs to another data set already.
    """
    used = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    for name, json_file, folder in cfg.DATASETS.COCO_JSON:
        if name not in used or not os.path.isfile(json_file):
            continue
        annotated = name in cfg.DATASETS.TEST or reads_annotations(cfg)
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            if known.get("json_file") != json_file:
                raise UserError(
                    f"DATASETS.COCO_JSON: the name {name!r} belongs to another data set already; choose a new one."
                )
            if known.get("annotated") == annotated:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        summary = check_coco_json(json_file, folder, annotated=annotated)
        log_summary(name, json_file, summary)
        DatasetCatalog.register(name, functools.partial(_load if annotated else _load_images, name, json_file, folder))
        metadata = MetadataCatalog.get(name)
        metadata.set(json_file=json_file, image_root=folder, evaluator_type="coco", annotated=annotated)
        if summary.classes:
            metadata.set(thing_classes=summary.classes)


def _load_images(name: str, json_file: str, folder: str) -> list[dict[str, Any]]:
    """Detectron2's dictionaries of images that nobody has looked at."""
    return [
        {
            "file_name": os.path.join(folder, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
        }
        for image in _read(json_file, annotated=False)["images"]
    ]


def _load(name: str, json_file: str, folder: str) -> list[dict[str, Any]]:
    """Detectron2's dictionaries, less the boxes without area: it would turn negative sides around."""
    dicts = load_coco_json(json_file, folder, name)
    for image in dicts:
        image["annotations"] = [a for a in image["annotations"] if min(a["bbox"][2:]) > 0]
    return dicts


def check_coco_json(path: str, image_folder: str, *, annotated: bool = True) -> CocoSummary:
    """Read an annotation file in COCO's format and check that Detectron2 can train and evaluate on it.

    Args:
        path: the json file.
        image_folder: where its images lie.
        annotated: False for images alone: annotations need not be there and are not looked at.

    Raises:
        UserError: not json, not COCO's format, no images, repeated ids, or images that are not on disk.
    """
    tree = _read(path, annotated)
    images = {}
    for image in tree["images"]:
        _require(path, "an image", image, id=int, file_name=str, width=int, height=int)
        images[image["id"]] = image
        if image["width"] <= 0 or image["height"] <= 0:
            raise UserError(
                f"{path}: the image with id {image['id']} has {image['width']} x {image['height']} pixels; both must be positive."
            )
    if not images:
        raise UserError(f"{path} has no images.")
    _require_unique_ids(path, tree, "images")
    missing = [i["file_name"] for i in tree["images"] if not os.path.isfile(os.path.join(image_folder, i["file_name"]))]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(images)} images are not in {image_folder}, the first is {missing[0]}."
        )
    for category in tree["categories"]:
        _require(path, "a category", category, id=int, name=str)
    _require_unique_ids(path, tree, "categories")
    names = {c["id"]: c["name"] for c in sorted(tree["categories"], key=lambda c: c["id"])}
    if annotated and not names:
        raise UserError(f"{path} has no categories.")

    summary = CocoSummary(len(images), len(tree["annotations"]), list(names.values()))
    for annotation in tree["annotations"]:
        _require(path, "an annotation", annotation, id=int, image_id=int, category_id=int, bbox=list)
        what = f"{path}: the annotation with id {annotation['id']}"
        if annotation["image_id"] not in images:
            raise UserError(f"{what} is of image {annotation['image_id']}, which is not in the file.")
        if annotation["category_id"] not in names:
            raise UserError(f"{what} is of category {annotation['category_id']}, which is not in the file.")
        if annotation.get("ignore"):
            raise UserError(f"{what} has 'ignore' set, which Detectron2 does not know; use 'iscrowd' or leave it out.")
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(v, int | float) and abs(v) < LARGEST for v in box):
            raise UserError(f"{what} has the bbox {box}; it must be four finite numbers [x, y, width, height].")
        x, y, w, h = box
        image = images[annotation["image_id"]]
        summary.boxes_without_area += w <= 0 or h <= 0
        summary.boxes_out_of_range += x < -1 or y < -1 or x + w > image["width"] + 1 or y + h > image["height"] + 1
        summary.zero_ids += annotation["id"] == 0
    _require_unique_ids(path, tree, "annotations")
    return summary


def log_summary(name: str, path: str, summary: CocoSummary) -> None:
    """Say what the file holds, and warn of what training or evaluation will treat in its own way."""
    logger.info(f"{name}: {summary.images} images, {summary.boxes} boxes, {len(summary.classes)} classes in {path}")
    if summary.boxes_without_area:
        logger.warning(
            f"{name}: {summary.boxes_without_area} boxes have no area; training drops them, evaluation counts them as missed."
        )
    if summary.boxes_out_of_range:
        logger.warning(f"{name}: {summary.boxes_out_of_range} boxes reach beyond their image; training clips them.")
    if summary.zero_ids:
        logger.warning(f"{name}: an annotation has id 0, which pycocotools never counts as found; number them from 1.")


def _read(path: str, annotated: bool) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable json: {error}.") from error
    if isinstance(tree, dict) and not annotated:
        tree = {"categories": [], **tree, "annotations": []}
    lists = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), list) for key in lists):
        raise UserError(
            f"{path} is not a COCO annotation file: it needs the lists 'images', 'annotations' and 'categories'."
        )
    return tree


def _require_unique_ids(path: str, tree: dict[str, Any], key: str) -> None:
    counts = Counter(entry["id"] for entry in tree[key])
    repeated = [i for i, n in counts.items() if n > 1]
    if repeated:
        raise UserError(f"{path}: the id {repeated[0]} occurs more than once in its {key}.")


def _require(path: str, what: str, entry: Any, **fields: type) -> None:
    for key, kind in fields.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind) or isinstance(entry.get(key), bool):
            raise UserError(
                f"{path} is not a COCO annotation file: {what} has no {kind.__name__} {key!r}: {str(entry)[:120]}."
            )
