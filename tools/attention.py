#!/usr/bin/env python
"""Where ICD's decoder looks for each instance: its attention over the levels, drawn over images of the test set.

    tools/attention.py --config-file CONFIG --weights CHECKPOINT --output DIR [--images 8] [--instances 4] [KEY VALUE ...]

CONFIG is the one that the distillation was trained with, CHECKPOINT one of its files. A picture an image, a row an
instance: the box, the attention of all levels together, and that of each level, scaled to its own largest value.
"""

import argparse
import os

from kd_d2 import KDMetaArch, UserError, load_config
from kd_d2.checkpoint import distiller_states
from kd_d2.config import KD_META_ARCH, find_file
from kd_d2.data import register_coco_json, register_synthetic
from kd_d2.distillers.icd import ICD
from kd_d2.engine.checks import check_classes, check_datasets, check_output_folder
from kd_d2.errors import exit_on_user_error
from kd_d2.evaluation.drawing import draw_instances, overlay_heat, per_pixel, sheet, titled
from kd_d2.evaluation.examples import pixels, read_examples

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances

SIDE = 200  # px of a picture's shorter side


def load_distillation(cfg: CfgNode, weights: str) -> tuple[KDMetaArch, ICD]:
    """The teacher and the trained ICD of a checkpoint; the student stays as it is built."""
    if cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH or "ICD" not in cfg.MODEL.KD.DISTILLERS:
        raise UserError("--config-file must be the config of a distillation with ICD in MODEL.KD.DISTILLERS.")
    model = build_model(cfg).eval()
    check_classes(cfg, model)
    own = distiller_states(weights)["ICD"]
    try:
        model.distillers["ICD"].load_state_dict(own)
    except RuntimeError as error:
        reason = "it has none" if not own else str(error).splitlines()[1].strip()
        raise UserError(f"--weights: {weights} does not hold the ICD decoder of this config: {reason}") from error
    return model, model.distillers["ICD"]


def draw(
    image: np.ndarray, target: Instances, attention: dict[int, torch.Tensor], names: list[str], most: int
) -> np.ndarray:
    """The sheet of an image, the largest instances first."""
    rows = []
    for n in target.gt_boxes.area().argsort(descending=True)[:most].tolist():
        boxed = draw_instances(image, target[[n]], names, min_side=SIDE)
        plain = cv2.resize(image, boxed.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        density = {
            stride: per_pixel(level[n].cpu().numpy(), stride, target.image_size) / stride**2
            for stride, level in attention.items()
        }
        pictures = {"instance": boxed, "all levels": overlay_heat(plain, sum(density.values()))}
        for stride, level in attention.items():
            title = f"stride {stride}: {100 * level[n].sum().item():.0f} %"
            pictures[title] = overlay_heat(plain, density[stride])
        rows.append([titled(picture, title) for title, picture in pictures.items()])
    return sheet(rows)


def share_inside(attention: dict[int, torch.Tensor], target: Instances) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each instance the part of its attention on cells whose centre is in its box, and the box's part of the image."""
    inside = 0
    for stride, level in attention.items():
        y, x = ((torch.arange(n, device=level.device) + 0.5) * stride for n in level.shape[-2:])
        left, top, right, bottom = target.gt_boxes.tensor[:, :, None].unbind(1)
        rows, columns = (y >= top) & (y <= bottom), (x >= left) & (x <= right)
        inside = inside + (level * rows[:, :, None] * columns[:, None]).sum((1, 2))
    return inside, target.gt_boxes.area() / (target.image_size[0] * target.image_size[1])


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    weights = find_file(args.weights, "--weights")
    register_synthetic()
    register_coco_json(cfg)
    check_datasets(cfg, train=True)
    model, icd = load_distillation(cfg, weights)
    check_output_folder(args.output, "--output")
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
    shares = []
    for example in read_examples(cfg, args.images):
        target = example["instances"].to(model.device)
        if not len(target):
            continue
        teacher = model.teacher([example], icd.needs)
        (attention,) = icd.attention_maps(teacher, [target])
        shares.append(torch.stack(share_inside(attention, target)).cpu())
        path = os.path.join(args.output, os.path.splitext(os.path.basename(example["file_name"]))[0] + ".png")
        picture = draw(pixels(example, cfg), target.to("cpu"), attention, names, args.instances)
        cv2.imwrite(path, picture[:, :, ::-1])
        print(path, flush=True)
    inside, area = (100 * torch.cat(shares, 1).mean(1)).tolist()
    print(f"{inside:.0f} % of an instance's attention lies in its box, which covers {area:.0f} % of the image (means).")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of the distillation")
    parser.add_argument("--weights", required=True, help="a checkpoint that it wrote")
    parser.add_argument("--output", required=True, help="folder of the pictures")
    parser.add_argument("--images", type=int, default=8, help="images with instances, from the first on (default 8)")
    parser.add_argument("--instances", type=int, default=4, help="rows of a picture (default 4)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    with exit_on_user_error():
        main(parser.parse_args())
