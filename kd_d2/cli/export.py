"""Export a trained detector to an ONNX, TorchScript or OpenVINO file, which runs without Detectron2.

kd-d2 export --model CONFIG_OR_RUN [WEIGHTS] --output FILE.onnx [KEY VALUE ...]

FILE ends with .onnx, .ts (TorchScript, for the CPU) or .xml (OpenVINO). It takes one image, uint8 [3, height, width],
and returns the detections; its metadata contains the resizing of images and the class names. It is written only if its
detections on some images of DATASETS.TEST match those of PyTorch. The differences are printed.
"""

from __future__ import annotations

import argparse

from ..arguments import add_import_argument, add_model_argument
from ..extensions import import_extensions
from ..model_paths import EXPORT_SUFFIXES, format_of, read_one_model_path
from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, "one")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file; its suffix determines the format")
    parser.add_argument(
        "--format",
        choices=sorted({*EXPORT_SUFFIXES.values()}),
        help="the format, to be checked against the suffix",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="the only supported input size (default: any)"
    )
    parser.add_argument("--no-nms", action="store_true", help="output all boxes and scores, without thresholds and NMS")
    parser.add_argument("--score-thresh", type=float, help="minimum detection score (default: that of the config)")
    parser.add_argument("--int8", action="store_true", help="quantize the convolutions of an ONNX file after training")
    parser.add_argument(
        "--calibration-images",
        type=int,
        default=128,
        metavar="N",
        help="number of images of DATASETS.TRAIN for --int8 (default 128)",
    )
    parser.add_argument("--images", nargs="+", help="images for the check (default: 8 of DATASETS.TEST)")
    add_import_argument(parser)


def run(args: argparse.Namespace) -> None:
    from ..config import load_config
    from ..errors import UserError
    from ..export import ExportOptions, export_detector
    from ..prediction import find_images

    print_log()
    import_extensions(args.imports)
    if args.format not in (None, format_of(args.output)):
        raise UserError(f"--format is {args.format}, but --output {args.output} has a different suffix.")
    model = read_one_model_path(args.model)
    cfg = load_config(model.config, [*model.overrides, *args.opts], student_only=True, needs_data=False)
    options = ExportOptions(
        fixed_size=tuple(args.size) if args.size else None,
        nms=not args.no_nms,
        score_thresh=args.score_thresh,
        int8=args.int8,
        calibration_images=args.calibration_images,
    )
    export_detector(cfg, args.output, options, find_images(args.images) if args.images else None)
