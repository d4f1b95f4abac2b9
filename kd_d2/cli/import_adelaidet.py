"""Import an FCOS that was trained with AdelaiDet, as a teacher or to deploy it.

kd-d2 import-adelaidet CHECKPOINT OUT [--config FILE] [KEY VALUE ...]

Writes OUT/config.yaml and OUT/model_final.pth, a Detectron2 config and checkpoint; OUT can be used like the output
folder of a training. AdelaiDet need not be installed. Detectors: FCOS with a ResNet or ResNeXt and FPN, also with deformable
convolutions. A part or setting of the detector that Detectron2 lacks is refused.
"""

from __future__ import annotations

import argparse

from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint of AdelaiDet, such as FCOS_MS_R_101_2x.pth"
    )
    parser.add_argument("output", metavar="OUT", help="new folder for config.yaml and model_final.pth")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config of the training, such as MS_R_101_2x.yaml (default: config.yaml in the folder of CHECKPOINT)",
    )


def run(args: argparse.Namespace) -> None:
    from ..adelaidet import import_detector

    print_log()
    print(import_detector(args.checkpoint, args.output, args.config, opts=args.opts).summary())
