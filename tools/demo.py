#!/usr/bin/env python
"""Distillation from end to end on the synthetic set: a teacher, a small student alone, the same student taught.

    tools/demo.py [--output DIR]

Prints one table and saves plots and detections as pictures. Started again, it goes on where it stopped.
"""

import argparse
import os
import time

from kd_d2 import load_config
from kd_d2.analysis.drawing import draw_instances, sheet, titled
from kd_d2.data import register_synthetic
from kd_d2.errors import exit_on_user_error
from kd_d2.sweep import compare, read_matrix

import cv2
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, BoxMode, Instances
from torchvision.ops import nms

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATASET = "synthetic_val"
PICTURES = 4
SHOWN_SCORE = 0.3
SHOWN_OVERLAP = 0.5  # intersection over union


def main(output: str) -> None:
    start = time.time()
    register_synthetic()
    print("Making the synthetic data, where it is not there yet ...", flush=True)
    images = DatasetCatalog.get(DATASET)
    DatasetCatalog.get("synthetic_train")
    print("Training a teacher, then a plain and a distilled student side by side ...", flush=True)
    compare(read_matrix(os.path.join(ROOT, "configs", "demo", "matrix.yaml")), output, [], jobs=2)
    print("Drawing detections ...", flush=True)
    path = os.path.join(output, "detections.png")
    draw_side_by_side(images, output, path)
    print(f"Detections of the three side by side: {path}")
    print(f"Finished after {(time.time() - start) / 60:.1f} minutes")


def draw_side_by_side(images: list[dict], output: str, path: str) -> None:
    """Ground truth, teacher, plain and distilled student on the first images that have several objects."""
    runs = {"teacher": "teacher/seed0", "plain student": "plain/seed0", "distilled student": "distilled/seed0"}
    predictors = {title: load_predictor(os.path.join(output, run)) for title, run in runs.items()}
    names = MetadataCatalog.get(DATASET).thing_classes
    rows = []
    for entry in [d for d in images if len(d["annotations"]) >= 3][:PICTURES]:
        bgr = read_image(entry["file_name"], "BGR")
        rgb = bgr[:, :, ::-1]
        row = [titled(draw_instances(rgb, ground_truth(entry), names, min_side=256), "ground truth")]
        for title, predictor in predictors.items():
            found = predictor(bgr)["instances"].to("cpu")
            found = surest(found[found.scores >= SHOWN_SCORE])
            row.append(titled(draw_instances(rgb, found, names, min_side=256), title))
        rows.append(row)
    cv2.imwrite(path, sheet(rows)[:, :, ::-1])


def surest(found: Instances) -> Instances:
    """Of detections that overlap, whatever their classes, the one with the highest score: the picture stays readable."""
    return found[nms(found.pred_boxes.tensor, found.scores, SHOWN_OVERLAP)]


def load_predictor(run: str) -> DefaultPredictor:
    """Detectron2's own predictor on a run's plain student config and checkpoint."""
    weights = os.path.join(run, "model_final.pth")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return DefaultPredictor(
        load_config(os.path.join(run, "student.yaml"), ["MODEL.WEIGHTS", weights, "MODEL.DEVICE", device])
    )


def ground_truth(entry: dict) -> Instances:
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in entry["annotations"]]
    truth = Instances((entry["height"], entry["width"]), gt_boxes=Boxes(torch.tensor(boxes)))
    truth.gt_classes = torch.tensor([a["category_id"] for a in entry["annotations"]])
    return truth


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo", help="folder of runs, table and pictures")
    with exit_on_user_error():
        main(parser.parse_args().output)
