"""`kd-d2 analyze robustness`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from detectron2.data import DatasetCatalog
from tqdm import tqdm

from ...cores import available_cores
from ...data import read_image
from ...errors import UserError, check_at_least
from ...files import check_output_folder, write_text
from ...report.page import Table, as_text
from ...text import csv_text
from ..base import NOT_STORED, Analysis
from ..drawing import write_picture
from ..models import TrainedModel, restrict_images
from .corruptions import CORRUPTIONS, SEVERITIES, load_corruptions
from .measure import check_measurable, measure_robustness
from .metrics import CLEAN_SEVERITY, Robustness
from .plots import corruption_sheet, plot_robustness

METRICS = ("AP", "AP50")
SHOWN_SEVERITY = 3


@dataclass
class RobustnessAnalysis(Analysis):
    """AP of detectors on corrupted images: 15 kinds of noise, blur, weather and digital artifacts at 5 severities.

    mPC, the mean performance under corruption, is the mean over corruptions of the mean over severities; rPC is mPC /
    clean (Michaelis et al. 2019). Corruptions are deterministic. Every measurement is saved immediately, so that the
    same command resumes after an interruption. The output folder contains robustness.csv (metrics by corruption and
    severity), summary.json (mPC and rPC), robustness.png and corruptions.png (an image under every corruption).
    """

    name = "robustness"
    title = "Robustness"
    file = "summary.json"
    figures = {
        "robustness.png": "AP over severity.",
        "corruptions.png": f"An image under every corruption, at severity {SHOWN_SEVERITY}.",
    }

    models: dict[str, dict[str, dict[str, float | None]]]
    """By title and metric (AP, AP50): clean, mPC, rPC, and the mean over severities for every corruption."""
    measured: dict[str, Robustness] = field(default_factory=dict, repr=False, metadata=NOT_STORED)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", type=int, help="number of images, evenly spaced (default all)")
        for name, values in (("corruptions", CORRUPTIONS), ("severities", SEVERITIES)):
            parser.add_argument(
                f"--{name}", type=_comma_separated, default=values, metavar="A,B,...", help=f"default all {len(values)}"
            )
        parser.add_argument(
            "--workers", type=int, default=available_cores(), help="processes that read images (default all cores)"
        )

    @classmethod
    def run(
        cls,
        models: Sequence[TrainedModel],
        output: str,
        *,
        images: int | None = None,
        corruptions: Sequence[str] = CORRUPTIONS,
        severities: Sequence[int | str] = SEVERITIES,
        workers: int = 0,
    ) -> Self:
        check_at_least("--workers", workers, 0)
        _check_choices("--corruptions", corruptions, CORRUPTIONS)
        _check_choices("--severities", list(map(str, severities)), list(map(str, SEVERITIES)))
        load_corruptions()
        check_at_least("--images", images, 1)
        check_output_folder(output, "--output")
        if images is not None:
            models = restrict_images(models, images, output)
        check_measurable(models, output)
        entries = DatasetCatalog.get(models[0].dataset)
        example = next((e for e in entries if e.get("annotations")), entries[0])
        picture = corruption_sheet(
            read_image(example["file_name"], "RGB"), example["image_id"], corruptions, SHOWN_SEVERITY
        )
        write_picture(os.path.join(output, "corruptions.png"), picture)
        progress = partial(tqdm, unit="image", leave=False)
        levels = sorted(map(int, severities))
        measured = {
            model.title: measure_robustness(model, output, corruptions, levels, workers, progress) for model in models
        }
        return cls({title: summarize(robustness) for title, robustness in measured.items()}, measured)

    def draw(self, folder: str) -> None:
        if not self.measured:
            return
        metrics = list(next(iter(self.measured.values())).clean)
        rows: list[list[Any]] = [["model", "corruption", "severity", *metrics]]
        for title, robustness in self.measured.items():
            found = {("clean", CLEAN_SEVERITY): robustness.clean}
            found |= {(c, s): values for c, by_s in robustness.corrupted.items() for s, values in by_s.items()}
            rows += [[title, c, s, *(as_text(of[m], ".4f", "nan") for m in metrics)] for (c, s), of in found.items()]
        write_text(os.path.join(folder, "robustness.csv"), csv_text(rows))
        plot_robustness(self.measured, os.path.join(folder, "robustness.png"))

    def sentences(self) -> list[str]:
        return [
            "Performance on corrupted images: mPC is the mean over corruptions of the mean over severities, rPC is mPC / clean "
            "(Michaelis et al. 2019)."
        ]

    def tables(self) -> list[Table]:
        columns = {f"{t}, {metric}": of.get(metric, {}) for metric in METRICS for t, of in self.models.items()}
        names = dict.fromkeys(name for column in columns.values() for name in column)
        rows = [
            [name.replace("_", " "), *(as_text(column.get(name), ".2f") for column in columns.values())]
            for name in names
        ]
        return [Table(["", *columns], rows, "Means over severities for each corruption.")]


def summarize(robustness: Robustness) -> dict[str, dict[str, float]]:
    """Return, by metric, clean, mPC, rPC, and the mean over severities for every corruption."""
    return {
        metric: {
            "clean": robustness.clean[metric],
            "mPC": robustness.mean(metric),
            "rPC": robustness.relative(metric),
            **{name: robustness.of_corruption(name, metric) for name in robustness.corrupted},
        }
        for metric in METRICS
    }


def _comma_separated(text: str) -> list[str]:
    return text.split(",")


def _check_choices(option: str, values: Sequence[str], choices: Sequence[str]) -> None:
    for value in values:
        if value not in choices:
            raise UserError(f"{option} names {value!r}; available: {', '.join(choices)}.")
