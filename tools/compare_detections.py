#!/usr/bin/env python
"""What two detectors find differently, on the images where they differ most.

    tools/compare_detections.py --model TITLE CONFIG WEIGHTS --model TITLE CONFIG WEIGHTS [--model ...] --output DIR
                                [--images 8] [--score-thresh 0.3] [KEY VALUE ...]

The first two models are compared: an object is gained where the second finds it and the first does not (a detection of its
class above the score, overlap at least 0.5), and lost the other way round. Half of the images are those with the most gained objects,
half those with the most lost. A picture an image: the objects, gained ones green, lost ones red, others grey; then the detections
of every model, of a teacher too where it is named as the third. DIR/differences.json counts all images of the data set.
"""

import argparse
import json
import os
from collections import Counter

from kd_d2 import UserError
from kd_d2.engine.analysed import add_model_arguments, detect_dataset, read_annotations, read_models
from kd_d2.engine.checks import check_output_folder
from kd_d2.errors import exit_on_user_error
from kd_d2.evaluation.coco import found_objects
from kd_d2.evaluation.drawing import draw_instances, sheet, titled

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances

SIDE = 360  # px of a picture's shorter side
GAINED, LOST, SAME = (42, 157, 80), (230, 57, 70), (150, 150, 150)


def differences(truth: dict, first: set[int], second: set[int]) -> dict[int, dict[str, list[int]]]:
    """By image the annotations that are gained and lost; images without any are left out."""
    images: dict[int, dict[str, list[int]]] = {}
    for annotation in truth["annotations"]:
        gained = annotation["id"] in second - first
        if gained or annotation["id"] in first - second:
            entry = images.setdefault(annotation["image_id"], {"gained": [], "lost": []})
            entry["gained" if gained else "lost"].append(annotation["id"])
    return images


def choose(images: dict[int, dict[str, list[int]]], count: int) -> list[int]:
    """Those with the most gained and those with the most lost objects in turn, the clearest first."""
    ranked = [
        sorted(images, key=lambda i: (len(images[i][other]) - len(images[i][key]), i))
        for key, other in (("gained", "lost"), ("lost", "gained"))
    ]
    chosen = list(dict.fromkeys(image for pair in zip(*ranked, strict=True) for image in pair))
    return chosen[:count]


def as_instances(entries: list[dict], image: np.ndarray, classes: dict[int, int]) -> Instances:
    """Detections of COCO's format, or objects where they have no score, in pixels of the image."""
    boxes = torch.tensor([e["bbox"] for e in entries]).view(-1, 4)
    boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
    labels = torch.tensor([classes[e["category_id"]] for e in entries], dtype=torch.int64)
    if entries and "score" not in entries[0]:
        return Instances(image.shape[:2], gt_boxes=boxes, gt_classes=labels)
    scores = torch.tensor([float(e["score"]) for e in entries])
    return Instances(image.shape[:2], pred_boxes=boxes, pred_classes=labels, scores=scores)


def draw_objects(
    image: np.ndarray, objects: list[dict], entry: dict[str, list[int]], names: dict[int, str]
) -> np.ndarray:
    """The objects, gained ones green, lost ones red, others grey and below."""
    groups = ((SAME, [o for o in objects if o["id"] not in entry["gained"] + entry["lost"]]),)
    groups += tuple(
        (color, [o for o in objects if o["id"] in entry[key]]) for color, key in ((GAINED, "gained"), (LOST, "lost"))
    )
    found = as_instances([o for _, group in groups for o in group], image, {c: n for n, c in enumerate(names)})
    colors = [color for color, group in groups for _ in group]
    return draw_instances(image, found, list(names.values()), min_side=SIDE, colors=colors)


def main(args: argparse.Namespace) -> None:
    if len(args.model) < 2:
        raise UserError("--model: name two models or more; the first two are compared.")
    if args.images < 1 or not 0 <= args.score_thresh <= 1:
        raise UserError(
            f"--images is {args.images} and --score-thresh {args.score_thresh}; at least 1, and between 0 and 1."
        )
    models = read_models(args)
    check_output_folder(args.output, "--output")
    truth = read_annotations(models[0].dataset)
    detections = {model.title: detect_dataset(model, args.output) for model in models}
    found = [found_objects(truth, detections[model.title], args.score_thresh) for model in models[:2]]
    images = differences(truth, *found)
    first, second = (model.title for model in models[:2])
    total = Counter({key: sum(len(entry[key]) for entry in images.values()) for key in ("gained", "lost")})
    with open(os.path.join(args.output, "differences.json"), "w") as file:
        json.dump({"compared": [first, second], "total": total, "images": images}, file, indent=1)

    names = {c["id"]: c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])}
    classes = {category: number for number, category in enumerate(names)}
    files = {entry["image_id"]: entry["file_name"] for entry in DatasetCatalog.get(models[0].dataset)}
    for number, image_id in enumerate(choose(images, args.images), 1):
        image, entry = read_image(files[image_id], "RGB"), images[image_id]
        objects = [a for a in truth["annotations"] if a["image_id"] == image_id and not a.get("iscrowd")]
        title = f"objects: {len(entry['gained'])} gained, {len(entry['lost'])} lost"
        row = [titled(draw_objects(image, objects, entry, names), title)]
        for model in models:
            shown = [
                d for d in detections[model.title] if d["image_id"] == image_id and d["score"] >= args.score_thresh
            ]
            drawn = draw_instances(image, as_instances(shown, image, classes), list(names.values()), min_side=SIDE)
            row.append(titled(drawn, model.title))
        path = os.path.join(args.output, f"{number:02d}-{os.path.splitext(os.path.basename(files[image_id]))[0]}.png")
        cv2.imwrite(path, sheet([row])[:, :, ::-1])
        print(path, flush=True)
    counted = sum(not a.get("iscrowd") for a in truth["annotations"])
    print(
        f"{second} finds {total['gained']} objects that {first} does not, and misses {total['lost']} that it finds, of {counted} "
        f"(score {args.score_thresh}); {len(images)} of {len(truth['images'])} images differ"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="pictures (default 8)")
    parser.add_argument("--score-thresh", type=float, default=0.3, help="lowest score of a detection (default 0.3)")
    add_model_arguments(parser, "two or more")
    with exit_on_user_error():
        main(parser.parse_args())
