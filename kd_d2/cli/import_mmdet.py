"""Import a detector that was trained with MMDetection, as a teacher or to deploy it.

kd-d2 import-mmdet CHECKPOINT OUT [--config FILE] [KEY VALUE ...]

Writes OUT/config.yaml and OUT/model_final.pth, a Detectron2 config and checkpoint; OUT can be used like the output
folder of a training. Detectors: RetinaNet, FSAF, FCOS, ATSS, GFL, RepPoints, Faster, Mask and Cascade R-CNN with a ResNet or
ResNeXt and FPN, of MMDetection 2 and 3, which need not be installed. Anything of the config that Detectron2 lacks is refused.
"""

from __future__ import annotations

import argparse

from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint of MMDetection, such as epoch_12.pth")
    parser.add_argument("output", metavar="OUT", help="new folder for config.yaml and model_final.pth")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="complete config that MMDetection writes to the work_dir of a training (default: that in the checkpoint)",
    )


def run(args: argparse.Namespace) -> None:
    from ..mmdet import import_detector

    print_log()
    print(import_detector(args.checkpoint, args.output, args.config, opts=args.opts).summary())
