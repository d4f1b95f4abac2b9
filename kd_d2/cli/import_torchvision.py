"""Import a detector of torchvision, as a teacher or to deploy it.

kd-d2 import-torchvision CHECKPOINT OUT [--classes FILE] [--batch-norm-eps X] [KEY VALUE ...]

Writes OUT/config.yaml and OUT/model_final.pth, a Detectron2 config and checkpoint; OUT can be used like the output
folder of a training. Detectors: Faster, Mask and Keypoint R-CNN, RetinaNet and FCOS with a ResNet or ResNeXt and FPN, such as those of
torchvision.models.detection.fasterrcnn_resnet50_fpn and fasterrcnn_resnet50_fpn_v2, with torchvision's anchors.
"""

from __future__ import annotations

import argparse

from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="file with the weights (torch.save(model.state_dict(), FILE)), or the name of a detector of torchvision, such as "
        "retinanet_resnet50_fpn_v2, whose weights for COCO are downloaded",
    )
    parser.add_argument("output", metavar="OUT", help="new folder for config.yaml and model_final.pth")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="text file with the class names, one per line from label 1, or 'coco' for those of torchvision's COCO, of whose 90 "
        "labels 80 are classes",
    )
    parser.add_argument(
        "--batch-norm-eps",
        type=float,
        metavar="X",
        help="epsilon of the backbone's batch normalization layers: 0 for detectors that were fine-tuned from torchvision's "
        "weights COCO_V1, which set it to 0 (default: 1e-5)",
    )


def run(args: argparse.Namespace) -> None:
    from ..torchvision import import_detector

    print_log()
    imported = import_detector(args.checkpoint, args.output, args.classes, args.batch_norm_eps, opts=args.opts)
    print(imported.summary())
