"""`kd-d2 analyze loss-maps`: where in the image a distillation loss is large, averaged over a training."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from detectron2.utils import comm

from ...arguments import add_launch_arguments
from ...engine.launch import run_processes
from ...errors import UserError, check_at_least
from ...files import check_output_folder
from ...model_paths import ModelPath
from ...text import folder_name
from ..base import Analysis
from ..drawing import write_picture
from ..models import Models, check_folder_names, read_paths
from .files import check_stride, mean_loss_maps, recorded_strides
from .pictures import RunShare, draw_loss_maps
from .recording import RECORDS, train_with_loss_maps

PICTURE = "loss_maps.png"
LAUNCH_DEFAULTS = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "rank_timeout": 30}


@dataclass
class LossMapAnalysis(Analysis):
    """Where in the image a distillation loss is large, averaged over a training.

    A --model that is the config of a distillation with one distiller is trained as with kd-d2 train, in a subfolder
    named after its title. Every N iterations, by default 40 times, loss maps are recorded for images of the test set:
    the loss at every position (averaged over channels) for StructuralKD, the norm of the loss's gradient with respect
    to the student's features for other methods. A --model that is the output folder of such a training is only drawn.

    loss_maps.png shows the trainings side by side, one row per image: the objects, then the mean of each training's
    maps from black (0) to yellow (maximum). loss_maps.json has the fraction of each loss inside the objects' boxes.
    """

    name = "loss-maps"
    title = "Loss maps"
    file = "loss_maps.json"
    figures = {PICTURE: "Yellow where the loss is largest."}

    box_area: float
    """The fraction of the image covered by the objects' boxes, averaged over the images."""
    runs: dict[str, RunShare]
    """By title."""

    @staticmethod
    def read_models(models: Models, opts: Sequence[str] = ()) -> list[tuple[ModelPath, list[str]]]:
        """Return the models with the overrides; a config is read when it is trained."""
        return [(path, list(opts)) for path in read_paths(models)]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", type=int, default=8, help="number of test images with instances (default 8)")
        parser.add_argument("--every", type=int, help=f"iterations between records (default: {RECORDS} records)")
        parser.add_argument("--stride", type=int, default=8, help="stride of the level to draw (default 8)")
        parser.add_argument("--resume", action="store_true", help="resume interrupted trainings")
        add_launch_arguments(parser)

    @classmethod
    def run(
        cls,
        models: Sequence[tuple[ModelPath, list[str]]],
        output: str,
        *,
        images: int = 8,
        every: int | None = None,
        stride: int = 8,
        resume: bool = False,
        imports: Sequence[str] = (),
        **launch_options: Any,
    ) -> Self:
        check_at_least("--images", images, 1)
        check_at_least("--every", every, 1)
        check_output_folder(output, "--output")
        check_folder_names([path for path, _ in models])
        folders = {path.title: training_folder(path, output) for path, _ in models}
        for path, _ in models:
            if path.run:
                maps, _ = mean_loss_maps(path.run)
                check_stride(stride, recorded_strides(maps), path.run)
        for path, opts in models:
            if path.run:
                continue
            args = argparse.Namespace(config_file=path.config, resume=resume, images=images, every=every, stride=stride)
            args.opts = [*opts, "OUTPUT_DIR", folders[path.title]]
            vars(args).update(
                title=path.title,
                imports=imports,
                eval_only=False,
                eval_teacher=False,
                **LAUNCH_DEFAULTS | launch_options,
            )
            run_processes(train_with_loss_maps, args)
            comm.synchronize()
        picture, *found = draw_loss_maps(folders, stride)
        if comm.is_main_process():
            write_picture(os.path.join(output, PICTURE), picture)
        return cls(*found)

    def sentences(self) -> list[str]:
        return [self._sentence(title, run) for title, run in self.runs.items()]

    def _sentence(self, title: str, run: RunShare) -> str:
        records = f"{run.records} records of the training"
        if run.images == 0 or run.share_in_boxes is None:
            return f"{title}: the loss is zero in every image ({records})."
        area = self.box_area if run.box_area is None else run.box_area
        counted = "" if run.images is None else f" over the images in which it is not zero: {run.images}"
        return (
            f"{title}: {100 * run.share_in_boxes:.0f} % of the loss lies in the objects' boxes, which cover "
            f"{100 * area:.0f} % of the image (means{counted}; {records})."
        )


def training_folder(path: ModelPath, output: str) -> str:
    """Return the output folder of a training that has recorded loss maps or will.

    Raises:
        UserError: the model is a config with weights.
    """
    if path.weights and not path.run:
        raise UserError(
            f"--model {path.title}: kd-d2 analyze loss-maps takes a config, which it trains, without weights, or the "
            "output folder of such a training."
        )
    return path.run or os.path.join(output, folder_name(path.title))
