#!/usr/bin/env python
"""How well detectors stand bad weather, bad lenses, bad sensors and bad files: 15 corruptions at 5 severities.

    tools/robustness.py --model TITLE CONFIG WEIGHTS [--model ...] --output DIR [--images N]
                        [--corruptions fog,snow] [--severities 1,3,5] [--workers N] [KEY VALUE ...]

mPC, the mean performance under corruption, is the mean over corruptions of the mean over severities; rPC is mPC / clean (Michaelis
et al. 2019). The same image is always corrupted in the same way. What is measured is kept at once: the same command goes on
where it was stopped. DIR gets robustness.csv (every metric of every corruption and severity), summary.json (mPC and rPC),
robustness.png and corruptions.png (one image in every corruption).
"""

import argparse
import csv
import os
from functools import partial

from kd_d2 import UserError
from kd_d2.engine.analysed import add_model_arguments, read_models, restrict_images
from kd_d2.engine.checks import check_output_folder
from kd_d2.engine.robustness import measure_robustness
from kd_d2.errors import exit_on_user_error
from kd_d2.evaluation.corruptions import CORRUPTIONS, SEVERITIES, load_corruptions
from kd_d2.evaluation.robustness import CLEAN_SEVERITY, Robustness
from kd_d2.evaluation.robustness_plots import corruption_sheet, plot_robustness
from kd_d2.files import write_json

import cv2
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from tabulate import tabulate
from tqdm import tqdm

SHOWN_SEVERITY = 3


def names(text: str) -> list[str]:
    return text.split(",")


def check(args: argparse.Namespace) -> None:
    if args.workers < 0:
        raise UserError(f"--workers is {args.workers}; it must be at least 0.")
    for corruption in args.corruptions:
        if corruption not in CORRUPTIONS:
            raise UserError(f"--corruptions names {corruption!r}; there are {', '.join(CORRUPTIONS)}.")
    for severity in args.severities:
        if severity not in map(str, SEVERITIES):
            raise UserError(f"--severities names {severity!r}; there are {', '.join(map(str, SEVERITIES))}.")
    load_corruptions()


def write_csv(models: dict[str, Robustness], path: str) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        metrics = list(next(iter(models.values())).clean)
        writer.writerow(["model", "corruption", "severity", *metrics])
        for title, robustness in models.items():
            cells = {("clean", CLEAN_SEVERITY): robustness.clean}
            cells |= {
                (c, s): values for c, severities in robustness.corrupted.items() for s, values in severities.items()
            }
            writer.writerows([title, c, s, *(f"{values[m]:.4f}" for m in metrics)] for (c, s), values in cells.items())


def summary(robustness: Robustness) -> dict[str, dict]:
    """Clean, mPC, rPC and the mean of every corruption, of AP and AP50."""
    return {
        metric: {
            "clean": robustness.clean[metric],
            "mPC": robustness.mean(metric),
            "rPC": robustness.relative(metric),
            **{name: robustness.of_corruption(name, metric) for name in robustness.corrupted},
        }
        for metric in ("AP", "AP50")
    }


def main(args: argparse.Namespace) -> None:
    check(args)
    models = read_models(args)
    check_output_folder(args.output, "--output")
    if args.images is not None:
        restrict_images(models, args.images, args.output)
    entries = DatasetCatalog.get(models[0].dataset)
    example = next((e for e in entries if e.get("annotations")), entries[0])
    picture = corruption_sheet(
        read_image(example["file_name"], "RGB"), example["image_id"], args.corruptions, SHOWN_SEVERITY
    )
    cv2.imwrite(os.path.join(args.output, "corruptions.png"), picture[:, :, ::-1])

    progress = partial(tqdm, unit="image", leave=False)
    found = {}
    for model in models:
        found[model.title] = measure_robustness(
            model, args.output, args.corruptions, list(map(int, args.severities)), args.workers, progress
        )
    write_csv(found, os.path.join(args.output, "robustness.csv"))
    summaries = {title: summary(robustness) for title, robustness in found.items()}
    write_json(os.path.join(args.output, "summary.json"), summaries)
    plot_robustness(found, os.path.join(args.output, "robustness.png"))
    for metric in ("AP", "AP50"):
        columns = {title: s[metric] for title, s in summaries.items()}
        rows = [[name, *(column[name] for column in columns.values())] for name in next(iter(columns.values()))]
        print(tabulate(rows, headers=[metric, *columns], floatfmt=".2f", tablefmt="github"), end="\n\n")
    print(f"{len(entries)} images; every number and the pictures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="how many images, spread evenly over the data set (default all)")
    parser.add_argument("--corruptions", type=names, default=list(CORRUPTIONS), help="by comma (default all 15)")
    parser.add_argument("--severities", type=names, default=list(map(str, SEVERITIES)), help="by comma (default all)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that corrupt (default all cores)"
    )
    add_model_arguments(parser, "one or more")
    with exit_on_user_error():
        main(parser.parse_args())
