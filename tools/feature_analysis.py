#!/usr/bin/env python
"""What feature maps look like: how alike neighbours are, single channels, and where students differ from their teacher.

    tools/feature_analysis.py [--teacher TITLE CONFIG WEIGHTS] --model TITLE CONFIG WEIGHTS [--model ...] --output DIR
                              [--images 100] [--pictures 4] [--channels 6] [--stride S] [KEY VALUE ...]

DIR gets, of the neck's levels over the images:
  correlation.csv  the correlation of horizontal and vertical neighbours, averaged over channels and images
  neighbours.png   features against their right neighbours; image pixels and random numbers below, to compare with
  distances.csv    how far each student is from the teacher: |s - t|^2 / |t|^2, correlation, l1 and SSIM loss of maps scaled to [0, 1],
                   SSIM's components (1: as the teacher's), range (max - min) over the teacher's
  differences/     an image each: where each student differs from the teacher, level by level
  channels/        an image each: the same random channels of all models, of the level with stride S
features.json has all numbers. Without --teacher there are no distances and no differences. Where the losses of a training
fall on the image, tools/loss_maps.py shows.
"""

import argparse
import csv
import math
import os
from collections.abc import Callable

from kd_d2 import UserError
from kd_d2.adapters import build_adapter
from kd_d2.data import CheckedMapper
from kd_d2.engine.analysed import TrainedModel, add_model_arguments, read_models, restrict_images
from kd_d2.engine.checks import check_output_folder
from kd_d2.errors import exit_on_user_error
from kd_d2.evaluation.examples import pixels
from kd_d2.evaluation.feature_plots import channel_sheet, difference_sheet, plot_neighbours
from kd_d2.evaluation.features import FeatureStatistics, difference_map
from kd_d2.files import write_json

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

PIXELS, NOISE = "image pixels", "random numbers"


class FeatureReader:
    """A model's neck outputs of an image, without what padding adds."""

    def __init__(self, model: TrainedModel):
        self.title = model.title
        detector = model.build().to(torch.device(model.cfg.MODEL.DEVICE))
        self.adapter = build_adapter(detector)
        self.mapper = CheckedMapper(DatasetMapper(model.cfg, is_train=False))
        self.cfg = model.cfg

    @torch.no_grad()
    def __call__(self, entry: dict) -> dict[int, Tensor]:
        """Maps (C, H, W) by stride."""
        outputs = self.adapter.run([self.mapper(entry)], frozenset({"features"}))
        height, width = outputs.images.image_sizes[0]
        return {
            stride: maps[0, :, : math.ceil(height / stride), : math.ceil(width / stride)].float()
            for stride, maps in outputs.features.items()
        }

    def image(self, entry: dict) -> np.ndarray:
        return pixels(self.mapper(entry), self.cfg)


def compared_strides(reader: FeatureReader, teacher: FeatureReader | None) -> list[int]:
    """The strides at which a student's maps can be compared with the teacher's."""
    if teacher is None or reader is teacher:
        return []
    own, others = reader.adapter.spec.shapes, teacher.adapter.spec.shapes
    strides = [stride for stride in own if stride in others and own[stride].channels == others[stride].channels]
    if not strides:
        raise UserError(
            f"{reader.title} and {teacher.title} have no level of one stride and one number of channels, so their features "
            "cannot be compared; leave --teacher out."
        )
    return strides


class FeatureAnalysis:
    """Models' features of one image after the other, gathered and drawn.

    Attributes:
        statistics: by title, those of image pixels and random numbers too.
    """

    def __init__(self, readers: list[FeatureReader], teacher: FeatureReader | None, stride: int | None, channels: int):
        self.readers = readers
        self.teacher = teacher
        self.strides = {reader.title: compared_strides(reader, teacher) for reader in readers}
        shapes = {reader.title: reader.adapter.spec.shapes for reader in readers}
        self.drawn_stride = stride or min(shapes[readers[0].title])
        for title, levels in shapes.items():
            if self.drawn_stride not in levels:
                raise UserError(f"--stride is {stride}; {title} has the strides {', '.join(map(str, levels))}.")
        self.random = np.random.RandomState(0)
        smallest = min(levels[self.drawn_stride].channels for levels in shapes.values())
        self.channels = sorted(self.random.choice(smallest, min(channels, smallest), replace=False).tolist())
        self.statistics = {name: FeatureStatistics() for name in (*shapes, PIXELS, NOISE)}

    def add(self, entry: dict) -> dict[str, np.ndarray]:
        """Gather an image's features. Returns pictures of it by folder, RGB."""
        image = self.readers[0].image(entry)
        levels = {reader.title: reader(entry) for reader in self.readers}
        differences = {title: self._compare(title, levels) for title in levels if self.strides[title]}
        pixels_CHW = torch.from_numpy(image).permute(2, 0, 1).float()
        noise_CHW = torch.from_numpy(self.random.uniform(size=pixels_CHW.shape))
        for title, maps in (*levels.items(), (PIXELS, {1: pixels_CHW}), (NOISE, {1: noise_CHW})):
            for stride, level in maps.items():
                self.statistics[title].add(stride, level, self.random)
        chosen = {title: maps[self.drawn_stride][self.channels].cpu().numpy() for title, maps in levels.items()}
        drawn = {"channels": channel_sheet(image, chosen, self.channels, self.drawn_stride)}
        if differences:
            common = sorted(set.intersection(*(set(maps) for maps in differences.values())))
            drawn["differences"] = difference_sheet(image, differences, common)
        return drawn

    def _compare(self, title: str, levels: dict[str, dict[int, Tensor]]) -> dict[int, np.ndarray]:
        """Gather how far a student is from the teacher; returns where the two differ."""
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

    def table(self, means: Callable[[FeatureStatistics], dict[int, dict[str, float]]]) -> list[dict]:
        """Means over the images by stride, a row a model and level."""
        return [
            {"model": title, "stride": stride, **values}
            for title, statistics in self.statistics.items()
            for stride, values in means(statistics).items()
        ]


def write_table(path: str, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict], value: str, what: str) -> None:
    """A row a model, a column a level."""
    titles, strides = ([*dict.fromkeys(row[key] for row in rows)] for key in ("model", "stride"))
    cells = {(row["model"], row["stride"]): row[value] for row in rows}
    table = [[title, *(cells.get((title, stride)) for stride in strides)] for title in titles]
    headers = [what, *(f"stride {stride}" for stride in strides)]
    print(tabulate(table, headers=headers, floatfmt=".3f", tablefmt="github"), end="\n\n")


def check_counts(args: argparse.Namespace) -> None:
    for name in ("pictures", "channels"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 0.")


def main(args: argparse.Namespace) -> None:
    check_counts(args)
    args.model = [*([args.teacher] if args.teacher else []), *args.model]
    models = read_models(args)
    check_output_folder(args.output, "--output")
    restrict_images(models, args.images, args.output)
    readers = [FeatureReader(model) for model in models]
    analysis = FeatureAnalysis(readers, readers[0] if args.teacher else None, args.stride, args.channels)
    entries = DatasetCatalog.get(models[0].dataset)
    for number, entry in enumerate(tqdm(entries, unit="image", leave=False)):
        pictures = analysis.add(entry)
        if number < args.pictures:
            for folder, picture in pictures.items():
                os.makedirs(os.path.join(args.output, folder), exist_ok=True)
                name = os.path.splitext(os.path.basename(entry["file_name"]))[0] + ".png"
                cv2.imwrite(os.path.join(args.output, folder, name), picture[:, :, ::-1])

    correlations = analysis.table(FeatureStatistics.mean_correlations)
    distances = analysis.table(FeatureStatistics.mean_distances)
    tree = {"images": len(entries), "correlations": correlations, "distances": distances}
    write_json(os.path.join(args.output, "features.json"), tree)
    write_table(os.path.join(args.output, "correlation.csv"), correlations)
    plot_neighbours(analysis.statistics, os.path.join(args.output, "neighbours.png"))
    print_table(correlations, "mean", "correlation of neighbours")
    if distances:
        write_table(os.path.join(args.output, "distances.csv"), distances)
        print_table(distances, "relative", f"|s - t|^2 / |t|^2 to {args.teacher[0]}")
        print_table(distances, "ssim", f"SSIM loss to {args.teacher[0]}")
        print_table(distances, "range", f"range over that of {args.teacher[0]}")
    print(f"{len(entries)} images; every number and the pictures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", nargs=3, metavar=("TITLE", "CONFIG", "WEIGHTS"), help="what the models learned from"
    )
    parser.add_argument("--images", type=int, default=100, help="spread evenly over the data set (default 100)")
    parser.add_argument("--pictures", type=int, default=4, help="images that are drawn (default 4)")
    parser.add_argument("--channels", type=int, default=6, help="channels that are drawn (default 6)")
    parser.add_argument("--stride", type=int, help="of the level whose channels are drawn (default the finest)")
    add_model_arguments(parser, "one or more")
    with exit_on_user_error():
        main(parser.parse_args())
