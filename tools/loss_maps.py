#!/usr/bin/env python
"""Where on the image the distillation loss falls, accumulated over a training.

    tools/loss_maps.py train --config-file CONFIG [--images 8] [--every N] [--resume] [KEY VALUE ...]
    tools/loss_maps.py draw RUN [RUN ...] --output PICTURE.png [--stride S]

"train" is a training as train_net.py's, with one distiller; every N iterations, by default 40 times in all, it also notes, for images of the
test set, in OUTPUT_DIR/loss_maps: of StructuralKD the loss of every position (its mean over the channels), of the other methods how hard
they pull there (the length of the loss's gradient in the student's features). "draw" puts runs side by side: a row an image, with its objects
first, then the mean of each run, black where it is 0 and yellow where it is largest; and it prints how much of each run's
loss or pull lies in the objects' boxes.
"""

import argparse
import os

from kd_d2 import UserError
from kd_d2.engine import KDTrainer, launch, setup
from kd_d2.engine.checks import check_distillation, check_output_folder
from kd_d2.engine.loss_maps import FOLDER, LossMapRecorder, mean_loss_maps
from kd_d2.errors import exit_on_user_error
from kd_d2.evaluation.drawing import draw_instances, overlay_heat, per_pixel, sheet, titled
from kd_d2.evaluation.examples import pixels, read_examples

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

SIDE = 320  # px of a picture's shorter side
EXAMPLES = "examples.npz"
MOMENTS = 40  # of a training, unless --every says otherwise


def train(args: argparse.Namespace) -> None:
    if (args.every is not None and args.every < 1) or args.images < 1:
        raise UserError(f"--every is {args.every} and --images {args.images}; both must be at least 1.")
    cfg = setup(args)
    check_distillation(cfg)
    trainer = KDTrainer(cfg)
    examples = read_examples(cfg, args.images)
    every = args.every or max(1, cfg.SOLVER.MAX_ITER // MOMENTS)
    recorder = LossMapRecorder(trainer.bare_model, examples, every, cfg.OUTPUT_DIR)
    if not args.resume:
        recorder.forget()
    if comm.is_main_process():
        save_examples(examples, cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.register_hooks([recorder])
    trainer.train()


def save_examples(examples: list[dict], cfg: CfgNode) -> None:
    """What "draw" needs of the images."""
    arrays = {"classes": np.array(MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes)}
    for number, example in enumerate(examples):
        arrays[f"{number}/image"] = pixels(example, cfg)
        arrays[f"{number}/boxes"] = example["instances"].gt_boxes.tensor.numpy()
        arrays[f"{number}/labels"] = example["instances"].gt_classes.numpy()
    np.savez(os.path.join(cfg.OUTPUT_DIR, FOLDER, EXAMPLES), **arrays)


def read_saved_examples(output: str) -> tuple[list[tuple[np.ndarray, Instances]], list[str]]:
    """Images RGB (H, W, 3) with their ground truth, and the names of the classes."""
    with np.load(os.path.join(output, FOLDER, EXAMPLES)) as arrays:
        examples = []
        while f"{len(examples)}/image" in arrays:
            number = len(examples)
            image = arrays[f"{number}/image"]
            truth = Instances(image.shape[:2], gt_boxes=Boxes(torch.from_numpy(arrays[f"{number}/boxes"])))
            truth.gt_classes = torch.from_numpy(arrays[f"{number}/labels"])
            examples.append((image, truth))
        return examples, arrays["classes"].tolist()


def inside_boxes(truth: Instances) -> np.ndarray:
    """(H, W) bool, whether a pixel is in any box."""
    mask = np.zeros(truth.image_size, bool)
    for left, top, right, bottom in truth.gt_boxes.tensor.round().int().tolist():
        mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return mask


def draw(args: argparse.Namespace) -> None:
    runs = {run: mean_loss_maps(run) for run in args.runs}
    for run, (_, count) in runs.items():
        print(f"{run}: {count} moments of the training")
    folder = os.path.dirname(os.path.abspath(args.output))
    check_output_folder(folder, "--output")
    examples, names = read_saved_examples(args.runs[0])
    for run, (maps, _) in runs.items():
        if f"{len(examples) - 1}/{args.stride}" not in maps or f"{len(examples)}/{args.stride}" in maps:
            strides = sorted({int(name.split("/")[1]) for name in maps})
            raise UserError(
                f"{run} has other images than {args.runs[0]}, or no level of stride {args.stride}; its strides are {strides}."
            )
    rows, covered, shares = [], [], {run: [] for run in runs}
    for number, (image, truth) in enumerate(examples):
        boxed = draw_instances(image, truth, names, min_side=SIDE)
        plain = cv2.resize(image, boxed.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        row, inside = [titled(boxed, "objects")], inside_boxes(truth)
        covered.append(inside.mean())
        for run, (maps, _) in runs.items():
            heat = per_pixel(maps[f"{number}/{args.stride}"], args.stride, image.shape[:2])
            shares[run].append((heat * inside).sum() / max(heat.sum(), 1e-12))
            row.append(titled(overlay_heat(plain, heat), os.path.basename(os.path.normpath(run))))
        rows.append(row)
    cv2.imwrite(args.output, sheet(rows)[:, :, ::-1])
    for run, of_images in shares.items():
        share, area = 100 * np.mean(of_images), 100 * np.mean(covered)
        print(
            f"{run}: {share:.0f} % of the loss lies in the objects' boxes, which cover {area:.0f} % of the image (means)"
        )
    print(args.output)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", parents=[default_argument_parser()], conflict_handler="resolve")
    training.add_argument("--images", type=int, default=8, help="of the test set, with instances (default 8)")
    training.add_argument("--every", type=int, help=f"iterations (default: {MOMENTS} times in all)")
    training.set_defaults(eval_teacher=False)
    drawing = commands.add_parser("draw")
    drawing.add_argument("runs", nargs="+", metavar="RUN", help="output folders of trainings")
    drawing.add_argument("--output", required=True, help="the picture")
    drawing.add_argument("--stride", type=int, default=8, help="of the level (default 8)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    if arguments.command == "train":
        launch(train, arguments)
    else:
        with exit_on_user_error():
            draw(arguments)
