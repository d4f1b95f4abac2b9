"""Detect objects in images and videos, and write drawings and all detections in COCO JSON.

kd-d2 predict --model CONFIG_OR_RUN [WEIGHTS] --input FILE_OR_FOLDER ... --output DIR [KEY VALUE ...]
kd-d2 predict --model EXPORTED --input FILE_OR_FOLDER ... --output DIR

EXPORTED is a file of kd-d2 export. DIR/detections.json has "images" (with the input file and the drawing; for a video,
each frame with its number and time), "annotations" (boxes with scores) and "categories", in the format of pycocotools.
"""

from __future__ import annotations

import argparse

from ..arguments import add_import_argument, add_model_argument
from ..errors import UserError, check_score_threshold
from ..extensions import import_extensions
from ..model_paths import read_one_model_path
from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, "one, which may be a file of kd-d2 export")
    parser.add_argument(
        "--input", required=True, nargs="+", help="images, videos, and folders of them, including subfolders"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for drawings and detections.json")
    parser.add_argument(
        "--score-thresh",
        type=float,
        help="minimum detection score (default 0.5, or that of an exported file if it is higher)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (images of one size; default 1)")
    parser.add_argument("--no-drawings", action="store_true", help="write only detections.json")
    add_import_argument(parser)


def run(args: argparse.Namespace) -> None:
    from ..prediction import PredictOptions, find_inputs, predict

    print_log()
    import_extensions(args.imports)
    check_score_threshold(args.score_thresh)
    model = read_one_model_path(args.model, may_be_exported=True)
    inputs = find_inputs(args.input, without=args.output)
    if model.exported:
        from ..export import load_exported_detector

        if args.opts:
            raise UserError(
                f"{model.exported} is an exported model, on which the override {args.opts[0]} has no effect."
            )
        detector, weights = load_exported_detector(model.exported, args.score_thresh), model.exported
    else:
        from ..config import load_config
        from ..predictor import SCORE_THRESH, Predictor

        cfg = load_config(model.config, [*model.overrides, *args.opts], student_only=True, needs_data=False)
        threshold = SCORE_THRESH if args.score_thresh is None else args.score_thresh
        detector, weights = Predictor(cfg, threshold), cfg.MODEL.WEIGHTS
    info = {"weights": weights, "score_thresh": detector.score_thresh}
    predict(detector, inputs, args.output, info, PredictOptions(args.batch, not args.no_drawings))
