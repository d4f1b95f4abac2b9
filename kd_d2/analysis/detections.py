"""`kd-d2 analyze detections`: objects that one detector finds and another misses."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Self

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from ..data import read_image
from ..errors import check_at_least, check_score_threshold
from ..evaluation.coco import found_objects
from ..files import check_inputs_are_kept, check_output_folder
from .base import Analysis
from .drawing import draw_instances, sheet, titled, write_picture
from .examples import picture_name
from .models import TrainedModel, check_models, read_annotations

SIDE = 360  # shorter side of a picture, in pixels
GAINED, LOST, SAME = (42, 157, 80), (230, 57, 70), (150, 150, 150)


@dataclass
class Difference:
    """Annotation ids of the objects that only the second model finds (gained) or only the first model finds (lost)."""

    gained: list[int]
    lost: list[int]


@dataclass
class DetectionAnalysis(Analysis):
    """Objects that one model finds and another misses, and the images on which the models differ most.

    The first two models are compared. An object is gained if only the second finds it (a detection of its class with
    the minimum score and IoU at least 0.5), and lost if only the first does. Half of the pictures show the images with
    the most gained objects, half those with the most lost: the objects (gained ones green, lost ones red, others gray),
    then the detections of every model, for example of a teacher as the third. differences.json covers all images.
    """

    name = "detections"
    title = "Detections"
    file = "differences.json"
    figures = {"[0-9]*-*.png": ""}
    model_count = (2, None)

    compared: tuple[str, str]
    total: dict[str, int]
    images: dict[str, Difference]
    """By image id; images without a difference are omitted."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", type=int, default=8, help="number of pictures (default 8)")
        parser.add_argument("--score-thresh", type=float, default=0.3, help="minimum detection score (default 0.3)")

    @classmethod
    def run(cls, models: Sequence[TrainedModel], output: str, *, images: int = 8, score_thresh: float = 0.3) -> Self:
        check_at_least("--images", images, 1)
        check_score_threshold(score_thresh)
        check_output_folder(output, "--output")
        truth = read_annotations(models[0].dataset)
        check_models(models)
        detections = {model.title: model.down_to(score_thresh).detections(output) for model in models}
        first, second = (found_objects(truth, detections[m.title], score_thresh) for m in models[:2])
        differing = differences(truth, first, second)
        entries = {entry["image_id"]: entry for entry in DatasetCatalog.get(models[0].dataset)}
        chosen = choose(differing, images)
        names = [f"{number:03d}-{picture_name(entries[image_id])}" for number, image_id in enumerate(chosen, 1)]
        check_inputs_are_kept(
            (os.path.join(output, name) for name in names), (entry["file_name"] for entry in entries.values())
        )
        cls.clear(output)
        for name, image_id in zip(names, chosen, strict=True):
            shown = {
                title: [d for d in found if d["image_id"] == image_id and d["score"] >= score_thresh]
                for title, found in detections.items()
            }
            image = read_image(entries[image_id]["file_name"], "RGB")
            picture = draw_differences(truth, image_id, image, differing[image_id], shown)
            write_picture(os.path.join(output, name), picture)
        total = {key: sum(len(getattr(d, key)) for d in differing.values()) for key in ("gained", "lost")}
        analysis = cls((models[0].title, models[1].title), total, {str(i): d for i, d in differing.items()})
        analysis.picture_files = names
        return analysis

    def sentences(self) -> list[str]:
        first, second = self.compared
        return [
            f"{second} finds {self.total['gained']} objects that {first} does not, and misses {self.total['lost']} that it finds; "
            f"{len(self.images)} images differ. Gained objects are green, lost ones red."
        ]


def differences(truth: dict, first: set[int], second: set[int]) -> dict[int, Difference]:
    """Return the gained and lost annotations by image; images without any are omitted."""
    images: dict[int, Difference] = {}
    for annotation in truth["annotations"]:
        number = annotation["id"]
        if (number in first) != (number in second):
            difference = images.setdefault(annotation["image_id"], Difference([], []))
            (difference.gained if number in second else difference.lost).append(number)
    return images


def choose(images: dict[int, Difference], count: int) -> list[int]:
    """Return alternately the images with the most gained and the most lost objects, largest differences first."""
    gained, lost = ({i: len(getattr(d, part)) for i, d in images.items()} for part in ("gained", "lost"))
    by_number = (sorted(filter(of.get, of), key=lambda i: (-of[i], i)) for of in (gained, lost))
    alternately = chain.from_iterable(zip_longest(*by_number))
    return [image for image in dict.fromkeys(alternately) if image is not None][:count]


def draw_differences(
    truth: dict, image_id: int, image: np.ndarray, difference: Difference, detections: dict[str, list[dict]]
) -> np.ndarray:
    """Draw the objects of an image, then the detections of each model.

    Args:
        image: RGB (H, W, 3) uint8.
        detections: detections on the image by model title.
    """
    names = {c["id"]: c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])}
    classes = {category: number for number, category in enumerate(names)}
    class_names = list(names.values())
    objects = [a for a in truth["annotations"] if a["image_id"] == image_id and not a.get("iscrowd")]
    color_of = dict.fromkeys(difference.gained, GAINED) | dict.fromkeys(difference.lost, LOST)
    colors = [color_of.get(o["id"], SAME) for o in objects]
    differ = [o["id"] in color_of for o in objects]
    drawn = draw_instances(
        image, as_instances(objects, image, classes), class_names, min_side=SIDE, colors=colors, on_top=differ
    )
    row = [titled(drawn, f"objects: {len(difference.gained)} gained, {len(difference.lost)} lost")]
    for title, found in detections.items():
        drawn = draw_instances(image, as_instances(found, image, classes), class_names, min_side=SIDE)
        row.append(titled(drawn, title))
    return sheet([row])


def as_instances(entries: list[dict], image: np.ndarray, classes: dict[int, int]) -> Instances:
    """Convert detections in COCO format, or annotations if they have no score, to instances in pixels of the image."""
    boxes = torch.tensor([e["bbox"] for e in entries]).view(-1, 4)
    boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
    labels = torch.tensor([classes[e["category_id"]] for e in entries], dtype=torch.int64)
    if entries and "score" not in entries[0]:
        return Instances(image.shape[:2], gt_boxes=boxes, gt_classes=labels)
    scores = torch.tensor([float(e["score"]) for e in entries])
    return Instances(image.shape[:2], pred_boxes=boxes, pred_classes=labels, scores=scores)
