"""`kd-d2 analyze errors`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

from tqdm import tqdm

from ...config import find_file
from ...cores import available_cores
from ...errors import UserError, check_at_least
from ...files import check_output_folder, write_text
from ...plain_yaml import read_plain_yaml
from ...report.page import Table, as_text
from ...text import csv_text, file_stem
from ..base import NOT_STORED, Analysis
from ..models import TrainedModel, check_models, read_annotations
from .curves import SIZES, STAGES, ErrorCurves, analyze_errors, supercategories_of
from .plots import plot_error_curves, plot_error_shares

CURVES_PER_WORKER = 10_000
"""Images times classes that take about as long as the start of a process."""
Areas = dict[str, dict[str, float | None]]
"""Area under the curve by size and stage."""


@dataclass
class ModelErrors:
    """Areas under the curves of a model.

    Attributes:
        overall: averaged over the classes.
        classes: by class.
    """

    overall: Areas
    classes: dict[str, Areas]


@dataclass
class ErrorAnalysis(Analysis):
    """Error types of detectors by class and object size, for one model or several side by side.

    There are seven precision-recall curves, each of which ignores more errors: IoU 0.75, IoU 0.5, IoU 0.1, confusions
    with a similar class (of the same super-category), confusions with any class, background, misses. The output folder
    contains curves.png (all classes), sizes.png (small, medium, large), costs.png (the cost of each error type),
    errors.csv and errors.json (areas under the curves by class), and with --classes one picture per class.
    """

    name = "errors"
    title = "Error types"
    file = "errors.json"
    figures = {
        "curves.png": "All classes.",
        "costs.png": "The cost of each error type, by object size.",
        "sizes.png": "Small, medium and large objects.",
        "classes/*.png": "One class: ",
    }

    models: dict[str, ModelErrors]
    curves: dict[str, ErrorCurves] = field(default_factory=dict, repr=False, metadata=NOT_STORED)
    draw_classes: bool = field(default=False, metadata=NOT_STORED)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--workers", type=int, default=None, help="processes (default one per core, fewer for small datasets)"
        )
        parser.add_argument(
            "--supercategories",
            metavar="FILE",
            help="YAML file with super-categories by class name (default: those of the annotation file)",
        )
        parser.add_argument("--classes", action="store_true", help="also draw the curves of each class")

    @classmethod
    def run(
        cls,
        models: Sequence[TrainedModel],
        output: str,
        *,
        workers: int | None = 1,
        supercategories: str | None = None,
        classes: bool = False,
    ) -> Self:
        check_at_least("--workers", workers, 1)
        check_output_folder(output, "--output")
        truth = read_annotations(models[0].dataset)
        workers = workers or useful_workers(truth)
        groups = read_supercategories(supercategories, truth)
        given = supercategories_of(truth["categories"])
        if groups is None and not given:
            print("The annotations have no super-categories, so Sim equals Loc; define some with --supercategories.")
        elif groups is None and len(given) == len(truth["categories"]) > 1 and len(set(given.values())) == 1:
            print("All classes have the same super-category, so Sim equals Oth; define others with --supercategories.")
        check_models(models)
        curves = {}
        for model in models:
            detections = model.detections(output)
            progress = partial(tqdm, total=len(truth["categories"]), desc=model.title, unit="class")
            curves[model.title] = analyze_errors(truth, detections, groups, workers, progress)
        errors = {t: ModelErrors(c.areas(), {n: c.areas(n) for n in c.class_names}) for t, c in curves.items()}
        cls.clear(output)
        return cls(errors, curves, classes)

    def draw(self, folder: str) -> None:
        rows = [
            [title, name, size, *(as_text(areas[size][stage], ".4f", "nan") for stage in STAGES)]
            for title, errors in self.models.items()
            for name, areas in [("all", errors.overall), *errors.classes.items()]
            for size in SIZES
        ]
        write_text(os.path.join(folder, "errors.csv"), csv_text([["model", "class", "size", *STAGES], *rows]))
        if not self.curves:
            return
        plot_error_curves(self.curves, os.path.join(folder, "curves.png"))
        plot_error_curves(self.curves, os.path.join(folder, "sizes.png"), sizes=SIZES[1:])
        plot_error_shares(self.curves, os.path.join(folder, "costs.png"))
        self.picture_files = ["curves.png", "sizes.png", "costs.png"]
        for name in next(iter(self.curves.values())).class_names if self.draw_classes else ():
            self.picture_files.append(f"classes/{file_stem(name)}.png")
            plot_error_curves(self.curves, os.path.join(folder, self.picture_files[-1]), name)

    def sentences(self) -> list[str]:
        return [
            "The area under the precision-recall curve in seven stages, each of which ignores more errors: IoU 0.75 (C75), 0.5 "
            "(C50) and 0.1 (Loc), confusions with a class of the same super-category (Sim) and with any class (Oth), "
            "detections of background (BG), and misses (FN)."
        ]

    def tables(self) -> list[Table]:
        rows = [
            [f"{title}, {size}", *_row(errors.overall, size)] for size in SIZES for title, errors in self.models.items()
        ]
        return [Table(["model, size of objects", *STAGES], rows)]

    def details(self) -> list[Table]:
        names = dict.fromkeys(name for errors in self.models.values() for name in errors.classes)
        rows = [
            [f"{name}, {title}", *_row(errors.classes.get(name, {}), "all")]
            for name in names
            for title, errors in self.models.items()
        ]
        return [Table(["class, model", *STAGES], rows, "By class, objects of all sizes.")]


def useful_workers(truth: dict) -> int:
    """Return the number of processes that have more to do than to start, at most one per core."""
    return min(available_cores(), 1 + len(truth["images"]) * len(truth["categories"]) // CURVES_PER_WORKER)


def _row(areas: Areas, size: str) -> list[str]:
    return [as_text(areas.get(size, {}).get(stage)) for stage in STAGES]


def read_supercategories(path: str | None, truth: dict) -> dict[int, str] | None:
    """Return super-categories by category id, or None for those of the annotation file.

    Raises:
        UserError: the file is not a mapping, or names an unknown class.
    """
    if path is None:
        return None
    named = read_plain_yaml(find_file(path, "--supercategories"), f"--supercategories: {path}", as_text=True)
    ids = {c["name"]: c["id"] for c in truth["categories"]}
    if not isinstance(named, dict):
        raise UserError(f"--supercategories: {path} must map class names to super-category names.")
    for name in named:
        if name not in ids:
            raise UserError(f"--supercategories: {path} names the class {name!r}; available: {', '.join(ids)}.")
    return {ids[name]: str(group) for name, group in named.items()}
