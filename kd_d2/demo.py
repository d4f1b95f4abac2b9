"""Distillation end to end on the synthetic shapes: a teacher, a small student alone, and the same student distilled."""

from __future__ import annotations

import logging
import os
import time

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, BoxMode, Instances
from torchvision.ops import nms

from .analysis.drawing import draw_instances, save_picture, sheet, titled
from .config import load_config
from .config_files import find_config_file
from .data import register_synthetic
from .sweep import SweepOptions, read_matrix, run_sweep

DATASET = "shapes_val"
PICTURES = 4
SHOWN_SCORE = 0.3
SHOWN_OVERLAP = 0.5  # intersection over union

logger = logging.getLogger(__name__)


def run_demo(output: str) -> None:
    """Train the three detectors, and write the table, plots and pictures of detections to `output`.

    An interrupted demo resumes where it stopped.
    """
    start = time.time()
    register_synthetic()
    logger.info("Creating the synthetic data, unless it already exists ...")
    images = DatasetCatalog.get(DATASET)
    DatasetCatalog.get("shapes_train")
    logger.info("Training a teacher, then a plain and a distilled student side by side ...")
    run_sweep(read_matrix(find_config_file("configs/demo/matrix.yaml", "the demo")), output, [], SweepOptions(jobs=2))
    logger.info("Drawing detections ...")
    path = os.path.join(output, "detections.png")
    draw_side_by_side(images, output, path)
    logger.info(f"Detections of the three side by side: {path}")
    logger.info(f"Finished after {(time.time() - start) / 60:.1f} minutes")


def draw_side_by_side(images: list[dict], output: str, path: str) -> None:
    """Draw the ground truth and the detections of the three detectors on the first images with several objects."""
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
    save_picture(path, sheet(rows))


def surest(found: Instances) -> Instances:
    """Keep only the highest-scoring of overlapping detections of any class, so that the picture is readable."""
    return found[nms(found.pred_boxes.tensor, found.scores, SHOWN_OVERLAP)]


def load_predictor(run: str) -> DefaultPredictor:
    """Create Detectron2's predictor from the plain student config and the checkpoint of a run."""
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
