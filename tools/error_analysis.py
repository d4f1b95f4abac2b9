#!/usr/bin/env python
"""What kinds of errors detectors make, class by class and by object size, one model or several side by side.

    tools/error_analysis.py --model TITLE CONFIG WEIGHTS [--model ...] --output DIR [--workers N]
                            [--supercategories FILE.yaml] [--classes] [KEY VALUE ...]

Precision over recall in seven stages, each forgiving more: IoU 0.75, 0.5, 0.1, confusions with a similar class (of the same
super-category), with any class, with background, misses. DIR gets curves.png (all classes), sizes.png (small, medium, large),
costs.png (what each kind costs), errors.csv and errors.json with the areas under the curves of every class, and with --classes
a picture of each class. Super-categories are those of the annotation file, or of a file of "class: super-category".
"""

import argparse
import csv
import json
import os
from functools import partial

from kd_d2 import UserError
from kd_d2.config import find_file
from kd_d2.engine.analysed import add_model_arguments, detect_dataset, read_annotations, read_models
from kd_d2.engine.checks import check_output_folder
from kd_d2.errors import exit_on_user_error
from kd_d2.evaluation.error_plots import plot_error_curves, plot_error_shares
from kd_d2.evaluation.error_types import SIZES, STAGES, ErrorCurves, analyze_errors

import yaml
from tabulate import tabulate
from tqdm import tqdm


def read_supercategories(path: str | None, truth: dict) -> dict[int, str] | None:
    """Super-categories by category id; None for those of the annotation file.

    Raises:
        UserError: the file is no mapping, or names a class that there is not.
    """
    if path is None:
        return None
    with open(find_file(path, "--supercategories"), encoding="utf-8") as file:
        named = yaml.safe_load(file)
    ids = {c["name"]: c["id"] for c in truth["categories"]}
    if not isinstance(named, dict):
        raise UserError(f"--supercategories: {path} must map names of classes to names of super-categories.")
    for name in named:
        if name not in ids:
            raise UserError(f"--supercategories: {path} names the class {name!r}; there are {', '.join(ids)}.")
    return {ids[name]: str(above) for name, above in named.items()}


def write_areas(models: dict[str, ErrorCurves], folder: str) -> None:
    """errors.json and errors.csv."""
    tree = {
        title: {"overall": curves.areas(), "classes": {name: curves.areas(name) for name in curves.class_names}}
        for title, curves in models.items()
    }
    with open(os.path.join(folder, "errors.json"), "w") as file:
        json.dump(tree, file, indent=1)
    with open(os.path.join(folder, "errors.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "class", "size", *STAGES])
        for title, found in tree.items():
            for name, areas in {"all": found["overall"], **found["classes"]}.items():
                writer.writerows([title, name, size, *(f"{a:.4f}" for a in areas[size].values())] for size in SIZES)


def main(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be at least 1.")
    models = read_models(args)
    check_output_folder(args.output, "--output")
    truth = read_annotations(models[0].dataset)
    above = read_supercategories(args.supercategories, truth)
    if above is None and not any(c.get("supercategory") for c in truth["categories"]):
        print("The annotations have no super-categories: Sim is Loc. --supercategories names some.")
    curves = {}
    for model in models:
        detections = detect_dataset(model, args.output)
        progress = partial(tqdm, total=len(truth["categories"]), desc=model.title, unit="class")
        curves[model.title] = analyze_errors(truth, detections, above, args.workers, progress)
    write_areas(curves, args.output)
    plot_error_curves(curves, os.path.join(args.output, "curves.png"))
    plot_error_curves(curves, os.path.join(args.output, "sizes.png"), sizes=SIZES[1:])
    plot_error_shares(curves, os.path.join(args.output, "costs.png"))
    if args.classes:
        for name in truth["categories"]:
            file = os.path.join(args.output, "classes", name["name"].replace(os.sep, "-") + ".png")
            plot_error_curves(curves, file, name["name"])
    rows = [[title, *c.areas()["all"].values()] for title, c in curves.items()]
    print(tabulate(rows, headers=["area under the curve", *STAGES], floatfmt=".3f", tablefmt="github"))
    print(f"Curves, costs and the areas of every class are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default all cores)")
    parser.add_argument("--supercategories", help="yaml: super-category by class name")
    parser.add_argument("--classes", action="store_true", help="a picture of each class too")
    add_model_arguments(parser, "one or more")
    with exit_on_user_error():
        main(parser.parse_args())
