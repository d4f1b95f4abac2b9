"""`kd-d2 analyze loss-maps`: where in the image a distillation loss is large, averaged over a training."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..arguments import add_launch_arguments
from ..engine import KDTrainer, setup, write_configs
from ..engine.checks import check_distillation
from ..engine.launch import run_processes
from ..engine.learning_rate import scale_to_world_size
from ..engine.rank_states import preserved_loss_normalizers
from ..errors import UserError
from ..extensions import import_extensions
from ..files import atomic_write, check_output_folder
from ..meta_arch import KDMetaArch
from ..model_paths import ModelPath
from ..random_state import preserved_random_state
from ..text import folder_name
from .base import Analysis, check_at_least, nanmean
from .drawing import draw_instances, enlarged, overlay_heat, per_pixel, sheet, titled, write_picture
from .examples import pixels, read_examples
from .models import Models, check_folder_names, read_paths

Example = tuple[np.ndarray, Instances]

FOLDER = "loss_maps"
EXAMPLES = "examples.npz"
PICTURE = "loss_maps.png"
SIDE = 320  # shorter side of a picture, in pixels
RECORDS = 40  # per training, unless --every is given
LAUNCH_DEFAULTS = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "rank_timeout": 30}


@dataclass
class RunShare:
    """Results of one training.

    Attributes:
        records: number of times the maps were recorded.
        share_in_boxes: fraction of the loss inside the objects' boxes, averaged over the images in which the loss is not
            zero; None or NaN if there are none.
        images: number of these images; None in files from before it was added.
        box_area: fraction of these images that the boxes cover; None in files from before it was added.
    """

    records: int
    share_in_boxes: float | None
    images: int | None = None
    box_area: float | None = None


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


def check_stride(stride: int, strides: Collection[int], whose: str) -> None:
    """Raise a UserError if the stride to draw is not among those of the levels."""
    if stride not in strides:
        raise UserError(f"{whose} has no level of stride {stride}; its strides are {sorted(strides)}.")


def train_with_loss_maps(args: argparse.Namespace) -> None:
    """Train a distillation and record loss maps; the main function of each process.

    Args:
        args: those of `engine.setup`, plus `title`, `imports`, `images`, `every` and `stride`.

    Raises:
        UserError: nothing would be recorded, or the student has no level of the stride.
    """
    import_extensions(args.imports)
    cfg = setup(args)
    check_distillation(cfg, f"--model {args.title}")
    iterations = scale_to_world_size(cfg, comm.get_world_size()).SOLVER.MAX_ITER
    every = args.every or max(1, iterations // RECORDS)
    if every > iterations:
        raise UserError(f"--every is {every}, but SOLVER.MAX_ITER is {iterations}: nothing would be recorded.")
    examples = read_examples(cfg, args.images)
    if args.resume:
        check_recorded_images(examples, cfg)
    trainer = KDTrainer(cfg)
    check_stride(args.stride, trainer.bare_model.adapter.spec.shapes, f"--model {args.title}")
    recorder = LossMapRecorder(trainer.bare_model, examples, every, cfg.OUTPUT_DIR)
    if comm.is_main_process():
        for path in _records(recorder.folder) if not args.resume else ():  # from an earlier training
            os.remove(path)
        save_examples(examples, cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.register_before_checkpoints(recorder)
    write_configs(cfg)
    trainer.train()


def check_recorded_images(examples: list[dict], cfg: CfgNode) -> None:
    """Raise a UserError if OUTPUT_DIR has records of other images or sizes."""
    drawn = [(pixels(example, cfg), example["instances"]) for example in examples]
    if _records(os.path.join(cfg.OUTPUT_DIR, FOLDER)) and not _are_equal(drawn, read_saved_examples(cfg.OUTPUT_DIR)[0]):
        raise UserError(
            f"--resume: {cfg.OUTPUT_DIR} has loss maps of other images or image sizes; resume with the same --images, "
            "test set and test size, or train anew without --resume."
        )


class LossMapRecorder(HookBase):
    """Writes `loss_maps/iteration_<N>.npz` in the output folder every `every` iterations.

    Each file has arrays "<image>/<stride>" (H, W), with student and teacher in eval mode. A resumed training overwrites
    files of repeated iterations. All processes record, as losses are normalized over all of them; the first one writes.

    Args:
        model: has one distiller.
        examples: images with ground truth, as returned by Detectron2's mapper for training.
        every: number of iterations.
        output: output folder of the training.

    Raises:
        UserError: there is no distiller or more than one.
    """

    def __init__(self, model: KDMetaArch, examples: list[dict], every: int, output: str):
        if len(model.distillers) != 1:
            raise UserError(
                "MODEL.KD.DISTILLERS must name one method, whose loss is recorded; it names "
                f"{', '.join(model.distillers) or 'none'}."
            )
        self.model = model
        (self.distiller,) = model.distillers.values()
        self.examples = examples
        self.every = every
        self.folder = os.path.join(output, FOLDER)
        os.makedirs(self.folder, exist_ok=True)

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration % self.every == 0:
            maps = self.record()
            if comm.is_main_process():
                path = os.path.join(self.folder, f"iteration_{iteration:07d}.npz")
                with atomic_write(path, "wb") as file:
                    np.savez(file, **maps)

    def record(self) -> dict[str, np.ndarray]:
        """Return the maps at the current iteration."""
        maps = {}
        was_training = self.model.training
        self.model.eval()
        with preserved_random_state(), preserved_loss_normalizers(self.model.student), EventStorage(self.trainer.iter):
            self.model.teacher.to(self.model.device)
            for number, example in enumerate(self.examples):
                targets = [example["instances"].to(self.model.device)]
                student = self.model.adapter.run([example], self.distiller.needs, targets)
                teacher = self.model.teacher([example], self.distiller.needs_of_teacher)
                for stride, level in self.distiller.loss_maps(student, teacher, targets).items():
                    maps[f"{number}/{stride}"] = level[0].cpu().numpy()
        self.model.train(was_training)
        return maps


def save_examples(examples: list[dict], cfg: CfgNode) -> None:
    """Save the images and their objects next to the loss maps, for `draw_loss_maps`."""
    arrays = {"classes": np.array(MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes)}
    for number, example in enumerate(examples):
        arrays[f"{number}/image"] = pixels(example, cfg)
        arrays[f"{number}/boxes"] = example["instances"].gt_boxes.tensor.numpy()
        arrays[f"{number}/labels"] = example["instances"].gt_classes.numpy()
    np.savez(os.path.join(cfg.OUTPUT_DIR, FOLDER, EXAMPLES), **arrays)


def read_saved_examples(output: str) -> tuple[list[Example], list[str]]:
    """Return RGB images (H, W, 3) with their ground truth, and the class names."""
    with np.load(os.path.join(output, FOLDER, EXAMPLES)) as arrays:
        examples = []
        while f"{len(examples)}/image" in arrays:
            number = len(examples)
            image = arrays[f"{number}/image"]
            truth = Instances(image.shape[:2], gt_boxes=Boxes(torch.from_numpy(arrays[f"{number}/boxes"])))
            truth.gt_classes = torch.from_numpy(arrays[f"{number}/labels"])
            examples.append((image, truth))
        return examples, arrays["classes"].tolist()


def mean_loss_maps(output: str) -> tuple[dict[str, np.ndarray], int]:
    """Return the mean of a training's records by "<image>/<stride>", and the number of records.

    Raises:
        UserError: there are no records.
    """
    paths = _records(os.path.join(output, FOLDER))
    if not paths:
        raise UserError(f"{output} has no {FOLDER}: name the config, and kd-d2 analyze loss-maps trains and records.")
    total: dict[str, np.ndarray] = {}
    for path in paths:
        with np.load(path) as maps:
            for name, level in maps.items():
                total[name] = total.get(name, 0) + level.astype(np.float64)
    return {name: level / len(paths) for name, level in total.items()}, len(paths)


def recorded_strides(maps: Iterable[str]) -> set[int]:
    """Return the strides in names "<image>/<stride>"."""
    return {int(name.split("/")[1]) for name in maps}


def draw_loss_maps(folders: dict[str, str], stride: int) -> tuple[np.ndarray, float, dict[str, RunShare]]:
    """Draw trainings side by side, one row per image; return the picture, the mean box area, and the results by title.

    Args:
        folders: output folders of the trainings by title.
        stride: stride of the level.

    Raises:
        UserError: a training has no records, records of different images, or no such level.
    """
    maps, records = {}, {}
    for title, folder in folders.items():
        maps[title], records[title] = mean_loss_maps(folder)
    first = next(iter(folders.values()))
    examples, names = read_saved_examples(first)
    for title, levels in maps.items():
        if not _are_equal(examples, read_saved_examples(folders[title])[0]):
            raise UserError(f"{folders[title]} has different images than {first}.")
        check_stride(stride, recorded_strides(levels), folders[title])
    rows, covered, shares = [], [], {title: [] for title in folders}  # NaN: the loss is zero
    for number, (image, truth) in enumerate(examples):
        inside = inside_boxes(truth)
        covered.append(inside.mean())
        row = [titled(draw_instances(image, truth, names, min_side=SIDE), "objects")]
        for title, levels in maps.items():
            heat = per_pixel(levels[f"{number}/{stride}"], stride, image.shape[:2])
            shares[title].append((heat * inside).sum() / heat.sum() if heat.any() else np.nan)
            row.append(titled(overlay_heat(enlarged(image, SIDE), heat), title))
        rows.append(row)
    runs = {}
    for title, of_images in shares.items():
        counts = ~np.isnan(of_images)
        area = float(nanmean(np.where(counts, covered, np.nan)))
        runs[title] = RunShare(records[title], float(nanmean(of_images)), int(counts.sum()), area)
    return sheet(rows), float(np.mean(covered)), runs


def _are_equal(first: list[Example], second: list[Example]) -> bool:
    """Return whether two trainings were recorded on the same images and boxes."""
    return len(first) == len(second) and all(
        np.array_equal(ours, theirs) and torch.equal(truth.gt_boxes.tensor, other.gt_boxes.tensor)
        for (ours, truth), (theirs, other) in zip(first, second, strict=True)
    )


def inside_boxes(truth: Instances) -> np.ndarray:
    """Return a bool mask (H, W) of the pixels inside any box."""
    mask = np.zeros(truth.image_size, bool)
    for left, top, right, bottom in truth.gt_boxes.tensor.round().int().tolist():
        mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return mask


def _records(folder: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), "iteration_*.npz"))
