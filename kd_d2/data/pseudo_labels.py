"""A data set's images labelled by a detector, as a COCO annotation file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json


@torch.no_grad()
def label_images(
    detect: Callable[[list[dict]], list[dict]],
    batches: Iterable[list[dict]],
    num_classes: int,
    dataset: str,
    score_threshold: float,
) -> tuple[dict[str, Any], str]:
    """
    Args:
        detect: what a Detectron2 detector does in eval mode: detections in pixels of the image as it lies on disk.
        batches: the data set's images as Detectron2's test loader gives them.
        num_classes: that `detect` knows.
        dataset: the registered name; its classes' names are taken where it has as many.
        score_threshold: detections with a higher score become annotations.

    Returns:
        the tree of an annotation file, each annotation with its score, and the folder that its file names count from.
    """
    paths, images, annotations = [], [], []
    for batch in batches:
        for entry, output in zip(batch, detect(batch), strict=True):
            detections = output["instances"].to("cpu")
            detections = detections[detections.scores > score_threshold]
            number = len(images) + 1
            height, width = detections.image_size
            paths.append(os.path.abspath(entry["file_name"]))
            images.append({"id": number, "width": width, "height": height})
            for annotation in instances_to_coco_json(detections, number):
                annotation["category_id"] += 1
                area = annotation["bbox"][2] * annotation["bbox"][3]
                annotations.append({"id": len(annotations) + 1, **annotation, "area": area, "iscrowd": 0})
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    for image, path in zip(images, paths, strict=True):
        image["file_name"] = os.path.relpath(path, folder)
    names = MetadataCatalog.get(dataset).get("thing_classes") or []
    if len(names) != num_classes:
        names = [f"class {number}" for number in range(num_classes)]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, folder
