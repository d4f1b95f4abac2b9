"""Write a dataset of another format as COCO json, one file a split; its images stay where they are.

kd-d2 convert IN OUT [--format FORMAT]

Formats: Pascal VOC (folders of xml, or the devkit with ImageSets), YOLO (with data.yaml, also as Roboflow writes it), LabelMe,
CVAT for images 1.1, Open Images csv, and COCO as tools export it. Needs the package globox (pip install 'kd_d2[convert]'). What
was counted and left out is printed, with the lines of yaml that train on it, which are in OUT/datasets.yaml too.
"""

from __future__ import annotations

import argparse

from ..errors import UserError

FORMATS = ("voc", "yolo", "labelme", "cvat", "openimages", "coco")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="folder with images and labels")
    parser.add_argument("output", metavar="OUT", help="folder of the json files and of datasets.yaml")
    parser.add_argument("--format", choices=FORMATS, help="the format (default: found out)")
    parser.add_argument(
        "--difficult",
        choices=["crowd", "keep", "drop"],
        default="crowd",
        help="boxes that are marked as difficult: COCO's iscrowd, neither trained on nor counted (default), kept like others, or dropped",
    )
    parser.add_argument(
        "--first-pixel",
        type=int,
        choices=[0, 1],
        help="number of an image's first pixel in Pascal VOC files (default: 0 where a box begins at 0, else 1)",
    )
    parser.add_argument(
        "--unlabelled",
        choices=["keep", "drop"],
        help="images without labels: without objects, or left out (default: keep for YOLO, drop for others)",
    )
    parser.add_argument(
        "--val-share",
        type=float,
        default=0.0,
        metavar="S",
        help="share of a set without splits that becomes val, such as 0.2",
    )
    parser.add_argument("--drop-broken", action="store_true", help="leave out what cannot be read, and say how much")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier conversion")


def run(args: argparse.Namespace) -> None:
    from ..data.convert import ConvertOptions, convert

    if args.opts:
        raise UserError(f"kd-d2 convert takes no config overrides, such as {args.opts[0]}.")
    if not 0 <= args.val_share < 1:
        raise UserError(f"--val-share is {args.val_share}; it must be from 0 to below 1.")
    options = ConvertOptions(args.difficult, args.first_pixel, args.unlabelled, args.drop_broken, args.val_share)
    print(convert(args.input, args.output, args.format, options, overwrite=args.overwrite).summary())
