#!/usr/bin/env python
"""One self-contained HTML page of a comparison, of trainings, and of what the programs of analysis found.

    tools/report.py --output PAGE.html [--title TITLE] [--matrix MATRIX.yaml --results DIR] [--run DIR ...]
                    [--detections DIR] [--errors DIR] [--robustness DIR] [--features DIR]
                    [--attention DIR] [--ranks DIR] [--loss-maps PICTURE.png]

Each option adds what a program left: --matrix and --results tools/compare.py (table with spreads, curves, cost, settings and
versions), --run train_net.py (scores by class, curves, config), --detections tools/compare_detections.py, --errors
tools/error_analysis.py, --robustness tools/robustness.py, --features tools/feature_analysis.py, --attention tools/attention.py,
--ranks tools/ranks.py, --loss-maps tools/loss_maps.py. The page opens from disk and needs no network.
"""

import argparse
import os
import tempfile

from kd_d2 import UserError
from kd_d2.engine.checks import check_output_folder
from kd_d2.errors import exit_on_user_error
from kd_d2.report import (
    Section,
    comparison_section,
    detections_section,
    errors_section,
    features_section,
    pictures_section,
    render,
    robustness_section,
    run_section,
)
from kd_d2.sweep import read_matrix
from kd_d2.versions import versions

PICTURES = {"attention": "Attention of ICD's decoder", "ranks": "Ranks", "loss_maps": "Where the loss falls"}
ANALYSES = {
    "detections": detections_section,
    "errors": errors_section,
    "robustness": robustness_section,
    "features": features_section,
}


def sections(args: argparse.Namespace, scratch: str) -> list[Section]:
    found = []
    if (args.matrix is None) != (args.results is None):
        raise UserError("--matrix and --results belong together: the matrix, and the folder of its finished cells.")
    if args.matrix:
        found.append(comparison_section(read_matrix(args.matrix), args.results, scratch))
    found += [run_section(folder, scratch) for folder in args.run]
    found += [analysis(name, getattr(args, name)) for name in ANALYSES if getattr(args, name)]
    for name, title in PICTURES.items():
        if getattr(args, name):
            found.append(pictures_section(title, getattr(args, name), "--" + name.replace("_", "-")))
    if not found:
        raise UserError("There is nothing to report: name a comparison (--matrix, --results), a --run or an analysis.")
    return found


def analysis(name: str, folder: str) -> Section:
    try:
        return ANALYSES[name](folder)
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--{name}: {folder} does not hold what its program writes ({reason}).") from error


def main(args: argparse.Namespace) -> None:
    folder = os.path.dirname(os.path.abspath(args.output))
    check_output_folder(folder, "--output")
    with tempfile.TemporaryDirectory() as scratch:
        page = render(args.title, sections(args, scratch), versions())
    with open(args.output, "w", encoding="utf-8") as file:
        file.write(page)
    print(f"{args.output}: {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the page")
    parser.add_argument("--title", default="Distilled detectors", help="of the page")
    parser.add_argument("--matrix", help="yaml file of a comparison")
    parser.add_argument("--results", help="folder of its finished cells")
    parser.add_argument(
        "--run", action="append", default=[], metavar="DIR", help="output folder of a training; may repeat"
    )
    for name in (*ANALYSES, *PICTURES):
        parser.add_argument("--" + name.replace("_", "-"), metavar="PATH", help="what its program wrote")
    with exit_on_user_error():
        main(parser.parse_args())
