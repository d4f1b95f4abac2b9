"""Label the training images once with the teacher, and write an annotation file in COCO format.

kd-d2 pseudo-label CONFIG --output FILE [--dataset NAME] [--score-thresh T] [KEY VALUE ...]

CONFIG is that of a distillation; with MODEL.KD.PSEUDO_LABELS.ENABLED its images need no annotations. Detections above
the score are written as annotations, with masks if the teacher predicts them. The last printed line has the overrides
to train on the file. MODEL.KD.PSEUDO_LABELS.ENABLED needs no file: the teacher then labels every augmented image.
"""

from __future__ import annotations

import argparse

from ..arguments import add_config_argument, add_import_argument
from ..extensions import import_extensions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "the config of a distillation")
    parser.add_argument("--output", required=True, metavar="FILE", help="the annotation file")
    parser.add_argument("--dataset", metavar="NAME", help="one of DATASETS.TRAIN (default: the only one)")
    parser.add_argument(
        "--score-thresh", type=float, help="minimum score of a label (default MODEL.KD.PSEUDO_LABELS.SCORE_THRESH)"
    )
    add_import_argument(parser)


def run(args: argparse.Namespace) -> None:
    from ..config import load_config
    from ..label_file import write_label_file

    import_extensions(args.imports)
    cfg = load_config(args.config_file, args.opts)
    labels, overrides = write_label_file(cfg, args.output, args.dataset, args.score_thresh)
    print(f"{len(labels['annotations'])} annotations of {len(labels['images'])} images: {args.output}")
    print(overrides)
