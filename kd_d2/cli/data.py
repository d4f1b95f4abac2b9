"""Check datasets before training.

kd-d2 data check CONFIG [--output DIR] [KEY VALUE ...]                        datasets of DATASETS.TRAIN and TEST
kd-d2 data check --train JSON IMAGES [--test JSON IMAGES] [--output DIR]      COCO JSON files with their image folders

Prints classes, boxes by class and size, image sizes, and what stops, distorts or may harm a training: entries that
are read differently than written, suspicious boxes, classes that differ between the datasets or in number from the
config's, the same images in training and test (by content), unreadable images. The exit status is 1 if anything
stops or distorts a training.
"""

from __future__ import annotations

import argparse
import os
import sys

from ..arguments import add_import_argument
from ..errors import UserError, check_at_least
from ..extensions import import_extensions
from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="print classes, sizes and problems",
        formatter_class=parser.formatter_class,
        description=__doc__,
    )
    check.add_argument("config_file", nargs="?", metavar="CONFIG", help="a config, instead of --train and --test")
    for role in ("train", "test"):
        check.add_argument(
            f"--{role}",
            nargs=2,
            action="append",
            default=[],
            metavar=("JSON", "IMAGES"),
            help=f"a COCO JSON file for {role}ing and its image folder; may be repeated",
        )
    check.add_argument(
        "--images", default="200", metavar="N", help="number of images to read per dataset, or all (default 200)"
    )
    check.add_argument(
        "--output", metavar="DIR", help="folder for check.json, samples.png and augmented.png (default: not written)"
    )
    check.add_argument(
        "--samples", type=int, default=12, metavar="N", help="images per dataset in the pictures (default 12)"
    )
    add_import_argument(check)


def run(args: argparse.Namespace) -> None:
    from ..analysis.drawing import write_picture
    from ..data_check import (
        DataSet,
        check_sets,
        class_count_of_config,
        config_to_check,
        draw_augmented,
        draw_samples,
        schedule_of_config,
        sets_of_config,
    )
    from ..files import check_output_folder

    print_log()
    import_extensions(args.imports)
    images = _read_count(args.images)
    check_at_least("--samples", args.samples, 1)
    given = [(role, *entry) for role in ("train", "test") for entry in getattr(args, role)]
    if (args.config_file is None) == (not given):
        raise UserError("Give either a CONFIG, or annotation files with --train and --test.")
    if given and args.opts:
        raise UserError(f"The override {args.opts[0]} has no effect without a CONFIG.")
    if given:
        names = _distinct_names([json_file for _, json_file, _ in given])
        sets = [
            DataSet(role, name, json_file, folder) for name, (role, json_file, folder) in zip(names, given, strict=True)
        ]
        skips, predicted = False, None
    else:
        sets, skips = sets_of_config(args.config_file, args.opts)
        predicted = class_count_of_config(args.config_file, args.opts)
    if args.output:
        check_output_folder(args.output, "--output")
    result = check_sets(sets, images, skips_unusable=skips, predicted=predicted)
    print(result.summary())
    schedule = args.config_file and schedule_of_config(args.config_file, args.opts, result)
    if schedule:
        print(f"\n{schedule}")
    if args.output:
        result.save(args.output)
        pictures = {"samples.png": draw_samples(result.sets, args.samples)}
        if args.config_file:
            cfg = config_to_check(args.config_file, args.opts)
            pictures["augmented.png"] = draw_augmented(result.sets, cfg, args.samples)
        for name, picture in pictures.items():
            if picture is not None:
                write_picture(os.path.join(args.output, name), picture)
    if result.errors:
        sys.exit(1)


def _distinct_names(files: list[str]) -> list[str]:
    """Return the names of files, with as many of their parent folders as make the names of different files distinct."""
    parts = [os.path.abspath(file).split(os.sep) for file in files]
    names = files
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-count:]) for part in parts]
        if len(set(names)) == len({*map(tuple, parts)}):
            break
    return names


def _read_count(text: str) -> int | None:
    """Parse a number of images; None for all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise UserError(f"--images is {text!r}; it must be a whole number or all.")
    return int(text)
