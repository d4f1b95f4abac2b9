"""`kd-d2 analyze features`."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from torch import Tensor
from tqdm import tqdm

from ...adapters import build_adapter
from ...data import build_test_mapper, evenly_spaced
from ...errors import UserError, check_at_least
from ...files import check_output_folder, write_text
from ...report.page import Table, as_text
from ...text import csv_text
from ..base import NOT_STORED, Analysis
from ..drawing import write_picture
from ..examples import picture_names, pixels
from ..models import TrainedModel
from .plots import channel_sheet, difference_sheet, plot_neighbors
from .statistics import FeatureStatistics, difference_map

PIXELS, NOISE = "image pixels", "random numbers"
Rows = list[dict[str, float | str | None]]
"""Rows with "model", "stride" and one number per kind of statistic."""


@dataclass
class FeatureAnalysis(Analysis):
    """Feature maps of the neck: correlation of neighbors, single channels, and differences from the teacher.

    With --teacher TITLE, the other models are compared with the model of that title. The output folder contains:
      correlation.csv  correlation of horizontal and vertical neighbors
      neighbors.png    features against their right neighbors, with image pixels
                       and random numbers for comparison
      distances.csv    distance of each student to the teacher: |s - t|^2 / |t|^2,
                       correlation, L1 and SSIM loss of maps scaled to [0, 1],
                       SSIM components (1 if equal), range over the teacher's
      differences/     where each student differs from the teacher, by level
      channels/        the same random channels of all models, at one stride
      features.json    all numbers
    """

    name = "features"
    title = "Features"
    file = "features.json"
    figures = {
        "neighbors.png": "Features against their right neighbors.",
        "differences/*.png": "Where the students differ from the teacher: ",
        "channels/*.png": "Channels side by side: ",
    }

    images: int
    correlations: Rows
    """Correlations of neighbors."""
    distances: Rows
    """Distances to the teacher; empty without one."""
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict, repr=False, metadata=NOT_STORED)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--teacher", metavar="TITLE", help="title of the --model to compare the others with")
        parser.add_argument("--images", type=int, default=100, help="number of images, evenly spaced (default 100)")
        parser.add_argument("--pictures", type=int, default=4, help="number of images to draw (default 4)")
        parser.add_argument("--channels", type=int, default=6, help="number of channels to draw (default 6)")
        parser.add_argument(
            "--stride", type=int, help="stride of the level to draw channels of (default the finest of all models)"
        )

    @classmethod
    def run(
        cls,
        models: Sequence[TrainedModel],
        output: str,
        *,
        teacher: str | None = None,
        images: int = 100,
        pictures: int = 4,
        channels: int = 6,
        stride: int | None = None,
    ) -> Self:
        check_at_least("--images", images, 1)
        check_at_least("--pictures", pictures, 0)
        check_at_least("--channels", channels, 0)
        titles = [model.title for model in models]
        if teacher is not None and teacher not in titles:
            raise UserError(f"--teacher {teacher}: no --model has this title; available: {', '.join(titles)}.")
        check_output_folder(output, "--output")
        gatherer = FeatureGatherer([FeatureReader(model) for model in models], teacher, stride, channels)
        entries = evenly_spaced(DatasetCatalog.get(models[0].dataset), images)
        folders = ("differences", "channels")
        names = picture_names(entries[:pictures], *(os.path.join(output, folder) for folder in folders))
        cls.clear(output)
        files = ["neighbors.png"]
        for number, entry in enumerate(tqdm(entries, unit="image", leave=False)):
            for folder, picture in gatherer.add(entry, draw=number < pictures).items():
                files.append(f"{folder}/{names[number]}")
                write_picture(os.path.join(output, files[-1]), picture)
        correlations = gatherer.table(FeatureStatistics.mean_correlations)
        distances = gatherer.table(FeatureStatistics.mean_distances)
        analysis = cls(len(entries), correlations, distances, gatherer.statistics)
        analysis.picture_files = files
        return analysis

    def draw(self, folder: str) -> None:
        for name, rows in (("correlation", self.correlations), ("distances", self.distances)):
            if rows:
                cells = [list(rows[0]), *(list(row.values()) for row in rows)]
                write_text(os.path.join(folder, f"{name}.csv"), csv_text(cells))
        if self.statistics:
            plot_neighbors(self.statistics, os.path.join(folder, "neighbors.png"))

    def sentences(self) -> list[str]:
        return [f"Means over {self.images} images."]

    def tables(self) -> list[Table]:
        tables = [_table(self.correlations, "Correlation of neighboring features.")]
        if self.distances:
            caption = (
                "Distance of the students' maps to the teacher's: |s - t|² / |t|², correlation over positions, mean absolute "
                "difference and SSIM loss of maps scaled to [0, 1], SSIM components (1 if equal), range relative to the "
                "teacher's."
            )
            tables.append(_table(self.distances, caption))
        return tables


def _table(rows: Rows, caption: str) -> Table:
    kinds = [key for key in rows[0] if key not in ("model", "stride")]
    cells = [[str(r.get("model")), str(r.get("stride")), *(as_text(r.get(kind)) for kind in kinds)] for r in rows]
    return Table(["model", "stride", *kinds], cells, caption)


class FeatureReader:
    """Computes the neck outputs of a model for an image, without the padding."""

    def __init__(self, model: TrainedModel):
        self.title = model.title
        self.adapter = build_adapter(model.build())
        self.mapper = build_test_mapper(model.cfg)
        self.cfg = model.cfg

    @torch.no_grad()
    def __call__(self, entry: dict) -> dict[int, Tensor]:
        """Return maps (C, H, W) by stride."""
        outputs = self.adapter.run([self.mapper(entry)], frozenset({"features"}))
        height, width = outputs.images.image_sizes[0]
        return {
            stride: maps[0, :, : math.ceil(height / stride), : math.ceil(width / stride)].float()
            for stride, maps in outputs.features.items()
        }

    def image(self, entry: dict) -> np.ndarray:
        """Return the image as RGB (H, W, 3) uint8 at the model's input resolution."""
        return pixels(self.mapper(entry), self.cfg)


class FeatureGatherer:
    """Collects statistics and draws pictures of several models' features, image by image.

    Args:
        readers: one per model.
        teacher: title of the model to compare the others with; None for no comparison.
        stride: stride of the level to draw channels of; None for the finest that all models have.
        channels: number of channels to draw.

    Attributes:
        statistics: by title, plus those of image pixels and random numbers.

    Raises:
        UserError: a student has no level that is comparable with the teacher's, or a model has no level of the stride to draw.
    """

    def __init__(self, readers: list[FeatureReader], teacher: str | None, stride: int | None, channels: int):
        self.readers = readers
        self.teacher = next((reader for reader in readers if reader.title == teacher), None)
        self.strides = {reader.title: _comparable_strides(reader, self.teacher) for reader in readers}
        shapes = {reader.title: reader.adapter.spec.shapes for reader in readers}
        self.drawn_stride = stride or min(set.intersection(*map(set, shapes.values())), default=None)
        if self.drawn_stride is None:
            have = ", ".join(f"{title} has {' '.join(map(str, levels))}" for title, levels in shapes.items())
            raise UserError(f"The models have no level of the same stride: {have}; analyze them one at a time.")
        for title, levels in shapes.items():
            if self.drawn_stride not in levels:
                raise UserError(f"--stride is {stride}; {title} has the strides {', '.join(map(str, levels))}.")
        self.random = np.random.RandomState(0)
        smallest = min(levels[self.drawn_stride].channels for levels in shapes.values())
        self.channels = sorted(self.random.choice(smallest, min(channels, smallest), replace=False).tolist())
        self.statistics = {name: FeatureStatistics() for name in (*shapes, PIXELS, NOISE)}

    def add(self, entry: dict, *, draw: bool) -> dict[str, np.ndarray]:
        """Add the features of an image; return its pictures by folder, or an empty dict unless `draw` is set."""
        image = self.readers[0].image(entry)
        levels = {reader.title: reader(entry) for reader in self.readers}
        differences = {title: self._compare(title, levels) for title in levels if self.strides[title]}
        pixels_CHW = torch.from_numpy(image).permute(2, 0, 1).float()
        noise_CHW = torch.from_numpy(self.random.uniform(size=pixels_CHW.shape))
        for title, maps in (*levels.items(), (PIXELS, {1: pixels_CHW}), (NOISE, {1: noise_CHW})):
            for stride, level in maps.items():
                self.statistics[title].add(stride, level, self.random)
        if not draw:
            return {}
        chosen = {title: maps[self.drawn_stride][self.channels].cpu().numpy() for title, maps in levels.items()}
        drawn = {"channels": channel_sheet(image, chosen, self.channels, self.drawn_stride)}
        if differences:
            common = sorted(set.intersection(*(set(maps) for maps in differences.values())))
            drawn["differences"] = difference_sheet(image, differences, common)
        return drawn

    def _compare(self, title: str, levels: dict[str, dict[int, Tensor]]) -> dict[int, np.ndarray]:
        """Add the distances of a student to the teacher; return the difference maps by stride."""
        found = {}
        for stride in self.strides[title]:
            own, target = levels[title][stride], levels[self.teacher.title][stride]
            if own.shape != target.shape:
                raise UserError(
                    f"At stride {stride} {title} has maps of {tuple(own.shape[1:])} cells and {self.teacher.title} of "
                    f"{tuple(target.shape[1:])}: set INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST for all models."
                )
            self.statistics[title].add_distances(stride, own, target)
            found[stride] = difference_map(own, target)
        return found

    def table(self, means: Callable[[FeatureStatistics], dict[int, dict[str, float]]]) -> Rows:
        """Return means over the images, one row per model and level."""
        return [
            {"model": title, "stride": stride, **values}
            for title, statistics in self.statistics.items()
            for stride, values in means(statistics).items()
        ]


def _comparable_strides(reader: FeatureReader, teacher: FeatureReader | None) -> list[int]:
    if teacher is None or reader is teacher:
        return []
    own, others = reader.adapter.spec.shapes, teacher.adapter.spec.shapes
    strides = [stride for stride in own if stride in others and own[stride].channels == others[stride].channels]
    if not strides:
        raise UserError(
            f"{reader.title} and {teacher.title} have no level with the same stride and number of channels, so their features "
            "cannot be compared; omit --teacher."
        )
    return strides
