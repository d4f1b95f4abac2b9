"""`kd-d2 analyze thresholds`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from ...errors import UserError
from ...files import check_output_folder, write_text
from ...report.page import Table, as_text
from ...text import csv_text, file_stem
from ..base import NOT_STORED, Analysis
from ..models import TrainedModel, check_models, read_annotations
from .confusion import confusion_matrix
from .curves import LARGEST_F1, OperatingPoint, ThresholdCurve, check_objects, measure_thresholds, pooled
from .plots import plot_confusion, plot_threshold_curves

SAVED = 200
"""Thresholds of a curve in curves.csv, at most."""
MEASURES = ("threshold", "precision", "recall", "f1", "tp", "fp", "fn")
HEADERS = ("threshold", "precision", "recall", "F1", "true", "false", "missed")


@dataclass
class ClassThresholds:
    """Chosen thresholds of a class, or of all classes together.

    Attributes:
        objects, detections: the numbers of those that count.
        points: by criterion; None if no threshold meets it.
    """

    objects: int
    detections: int
    points: dict[str, OperatingPoint | None]


@dataclass
class ModelThresholds:
    """Chosen thresholds of a model.

    Attributes:
        overall: for all classes together.
        classes: by class.
        confusion: see `confusion_matrix`; at the threshold with the largest F1 of all classes together, or, if no
            detection is true, for all detections.
    """

    overall: ClassThresholds
    classes: dict[str, ClassThresholds]
    confusion: list[list[int]]


@dataclass
class ThresholdAnalysis(Analysis):
    """Score thresholds of detectors: precision, recall and F1 over the threshold, and the confusion of classes.

    The threshold with the largest F1 is chosen for each class and for all classes together (with the sums of their
    counts), and with --precision and --recall the lowest and the highest threshold with at least that value. Detections
    are matched to objects of all sizes as in COCO's evaluation. Scores below the config's own threshold do not occur.
    The output folder contains thresholds.csv (the chosen thresholds), curves.csv (at most 200 thresholds per class),
    confusion.csv (annotated and detected classes at the threshold with the largest F1 of all classes), curves.png and a
    picture of the confusion for each model.
    """

    name = "thresholds"
    title = "Score thresholds"
    file = "thresholds.json"
    figures = {
        "curves.png": "All classes together, over the score threshold.",
        "confusion/*.png": "Annotated and detected classes, colored by the share of the annotated class: ",
    }

    iou: float
    models: dict[str, ModelThresholds]
    curves: dict[str, dict[str, ThresholdCurve]] = field(default_factory=dict, repr=False, metadata=NOT_STORED)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--iou", type=float, default=0.5, help="minimum IoU of a true detection (default 0.5)")
        for name, which in (("precision", "lowest"), ("recall", "highest")):
            parser.add_argument(
                f"--{name}",
                type=float,
                metavar=name[0].upper(),
                help=f"also find the {which} threshold with this {name}",
            )

    @classmethod
    def run(
        cls,
        models: Sequence[TrainedModel],
        output: str,
        *,
        iou: float = 0.5,
        precision: float | None = None,
        recall: float | None = None,
    ) -> Self:
        for option, value in (("--iou", iou), ("--precision", precision), ("--recall", recall)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{option} is {value}; it must be greater than 0 and at most 1.")
        check_output_folder(output, "--output")
        truth = read_annotations(models[0].dataset)
        check_objects(truth)
        check_models(models)
        found, curves = {}, {}
        for model in models:
            detections = model.detections(output)
            of_classes = measure_thresholds(truth, detections, iou)
            together = pooled(of_classes.values())
            overall = _chosen(together, precision, recall)
            best = overall.points[LARGEST_F1]
            confusion = confusion_matrix(truth, detections, 0 if best is None else best.threshold, iou)
            classes = {name: _chosen(curve, precision, recall) for name, curve in of_classes.items()}
            found[model.title] = ModelThresholds(overall, classes, confusion.tolist())
            curves[model.title] = of_classes
        cls.clear(output)
        return cls(iou, found, curves)

    def draw(self, folder: str) -> None:
        chosen, curves, confusion = [], [], []
        for title, model in self.models.items():
            chosen += [
                [title, name, criterion, *(_cells(point, ".4f", "") if point else [""] * len(MEASURES))]
                for name, found in [("all", model.overall), *model.classes.items()]
                for criterion, point in found.points.items()
            ]
            rows = zip([*model.classes, "background"], model.confusion, strict=True)
            confusion += [[title, annotated, *counts] for annotated, counts in rows]
        for title, of_classes in self.curves.items():
            for name, curve in [("all", pooled(of_classes.values())), *of_classes.items()]:
                curves += [[title, name, *_cells(curve.at(index), ".4f", "")] for index in curve.spread(SAVED)]
        names = list(next(iter(self.models.values())).classes)
        for file, header, rows in (
            ("thresholds.csv", ["class", "criterion", *MEASURES], chosen),
            ("confusion.csv", ["annotated", *names, "missed"], confusion),
            ("curves.csv", ["class", *MEASURES], curves),
        ):
            if rows:
                write_text(os.path.join(folder, file), csv_text([["model", *header], *rows]))
        if not self.curves:
            return
        points = {title: model.overall.points for title, model in self.models.items()}
        together = {title: pooled(of_classes.values()) for title, of_classes in self.curves.items()}
        plot_threshold_curves(together, points, os.path.join(folder, "curves.png"))
        self.picture_files = ["curves.png"]
        for title, model in self.models.items():
            best = points[title][LARGEST_F1]
            scores = "all scores" if best is None else f"scores of at least {best.threshold_text}"
            self.picture_files.append(f"confusion/{file_stem(title)}.png")
            path = os.path.join(folder, self.picture_files[-1])
            plot_confusion(np.array(model.confusion), names, f"{title}: {scores}", path)

    def sentences(self) -> list[str]:
        sentences = [
            f"Detections with a score of at least the threshold are matched to objects of their class at an IoU of {self.iou}. Of all "
            "classes together, their counts are summed."
        ]
        for title, model in self.models.items():
            best = model.overall.points[LARGEST_F1]
            if best is None:
                sentences.append(f"{title}: no detection is true, so there is no threshold to choose.")
                continue
            sentences.append(
                f"{title}: with one threshold for all classes, as --score-thresh takes it, F1 is largest, {best.f1:.3f}, at {best.threshold_text}: "
                f"kd-d2 predict --model MODEL --input IMAGES --output FOLDER --score-thresh {best.threshold_text}"
            )
        sentences.append(
            "Choose a threshold on other images than those on which its precision and recall are reported: on these they are better "
            "than on new ones."
        )
        return sentences

    def tables(self) -> list[Table]:
        rows = [
            [f"{title}, {criterion}", *_row(model.overall, criterion)]
            for title, model in self.models.items()
            for criterion in model.overall.points
        ]
        return [Table(["model, criterion", *HEADERS], rows, "All classes together.")]

    def details(self) -> list[Table]:
        first = next(iter(self.models.values()))
        return [
            Table(
                ["class, model", "objects", *HEADERS],
                [
                    [f"{name}, {title}", str(model.classes[name].objects), *_row(model.classes[name], criterion)]
                    for name in first.classes
                    for title, model in self.models.items()
                ],
                f"By class: {criterion}.",
            )
            for criterion in first.overall.points
        ]


def _chosen(curve: ThresholdCurve, precision: float | None, recall: float | None) -> ClassThresholds:
    detections = int(curve.tp[-1] + curve.fp[-1]) if len(curve.scores) else 0
    return ClassThresholds(curve.objects, detections, curve.points(precision, recall))


def _row(found: ClassThresholds, criterion: str) -> list[str]:
    point = found.points[criterion]
    if point is not None:
        return _cells(point)
    has_curve = found.objects and found.detections
    return ["none" if has_curve else "-", *["-"] * (len(HEADERS) - 1)]


def _cells(point: OperatingPoint, form: str = ".3f", missing: str = "-") -> list[str]:
    measures = [as_text(value, form, missing) for value in (point.precision, point.recall, point.f1)]
    return [point.threshold_text, *measures, *map(str, (point.tp, point.fp, point.fn))]
