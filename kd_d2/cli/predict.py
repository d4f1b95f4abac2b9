"""Detect objects in images: each image with its detections drawn, and all detections as COCO json.

kd-d2 predict --model CONFIG_OR_RUN [WEIGHTS] --input IMAGE_OR_FOLDER ... --output DIR [KEY VALUE ...]

DIR/detections.json has "images" (with the file read and the drawing), "annotations" (boxes with scores) and "categories",
as pycocotools loads them.
"""

from __future__ import annotations

import argparse

from ..extensions import import_extensions
from ..model_paths import read_one_model_path
from .arguments import add_import_argument, add_model_argument
from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, "one")
    parser.add_argument("--input", required=True, nargs="+", help="images, and folders of images")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the drawings and of detections.json")
    parser.add_argument("--score-thresh", type=float, default=0.5, help="lowest score of a detection (default 0.5)")
    add_import_argument(parser)


def run(args: argparse.Namespace) -> None:
    from ..config import load_config
    from ..predictor import predict_images

    print_log()
    import_extensions(args.imports)
    model = read_one_model_path(args.model)
    cfg = load_config(model.config, [*args.opts, *model.overrides], student_only=True, needs_data=False)
    predict_images(cfg, args.input, args.output, args.score_thresh)
