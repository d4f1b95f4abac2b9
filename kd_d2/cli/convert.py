"""Convert a dataset to COCO JSON, with one file per split; the images are not moved.

kd-d2 convert IN OUT [--format FORMAT]

Formats: Pascal VOC (XML folders, or the devkit with ImageSets), YOLO (with data.yaml, also from Roboflow), LabelMe,
CVAT for images 1.1, Open Images CSV, COCO as exported by tools. Needs the package globox: pip install 'kd_d2[convert]'.
Prints what was counted and left out, and the YAML lines for training on it, which are also in OUT/datasets.yaml.
"""

from __future__ import annotations

import argparse

from ..errors import UserError

FORMATS = ("voc", "yolo", "labelme", "cvat", "openimages", "coco")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="folder with images and labels")
    parser.add_argument("output", metavar="OUT", help="folder for the JSON files and datasets.yaml")
    parser.add_argument("--format", choices=FORMATS, help="the format (default: detected)")
    parser.add_argument(
        "--difficult",
        choices=["crowd", "keep", "drop"],
        default="crowd",
        help="boxes marked as difficult: crowd, neither trained on nor counted (default), keep, as other boxes, or drop",
    )
    parser.add_argument(
        "--first-pixel",
        type=int,
        choices=[0, 1],
        help="coordinate of the first pixel in Pascal VOC files (default: 0 if a box begins at 0, else 1)",
    )
    parser.add_argument(
        "--unlabelled",
        choices=["keep", "drop"],
        help="images without labels: keep as images without objects, or drop (default: keep for YOLO, drop for others)",
    )
    parser.add_argument(
        "--val-share",
        type=float,
        default=0.0,
        metavar="S",
        help="fraction of a dataset without splits to use as val, such as 0.2",
    )
    parser.add_argument("--drop-broken", action="store_true", help="leave out what cannot be read, and print how much")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier conversion")


def run(args: argparse.Namespace) -> None:
    from ..data.convert import ConvertOptions, convert

    if args.opts:
        raise UserError(f"kd-d2 convert takes no config overrides, such as {args.opts[0]}.")
    if not 0 <= args.val_share < 1:
        raise UserError(f"--val-share is {args.val_share}; it must be from 0 to below 1.")
    options = ConvertOptions(args.difficult, args.first_pixel, args.unlabelled, args.drop_broken, args.val_share)
    print(convert(args.input, args.output, args.format, options, overwrite=args.overwrite).summary())
