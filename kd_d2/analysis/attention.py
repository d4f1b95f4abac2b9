"""`kd-d2 analyze attention`: the attention of ICD's decoder over the feature levels, instance by instance."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from detectron2.structures import Instances

from ..distillers.icd import ICD
from ..errors import UserError
from ..files import check_output_folder
from ..meta_arch import KDMetaArch
from .base import Analysis, check_at_least
from .drawing import draw_instances, enlarged, overlay_heat, per_pixel, sheet, titled, write_picture
from .examples import picture_name, pixels, read_examples
from .models import Distillation, load_distillations

SIDE = 200  # px of a picture's shorter side


@dataclass
class AttentionAnalysis(Analysis):
    """The attention of ICD's decoder over the feature levels, drawn on images of the test set.

    The model is a distillation with ICD and a checkpoint of its training. The output folder gets a picture per image with a row per
    instance: the box, the attention of all levels together, and that of each level, scaled to its own maximum; and
    attention.json with the mean share of an instance's attention that lies in its box.
    """

    name = "attention"
    title = "Attention of ICD's decoder"
    file = "attention.json"
    model_count = (1, 1)
    read_models = staticmethod(partial(load_distillations, train=True))

    images: int
    instances: int
    share_in_box: float
    """The fraction of an instance's attention in its box, mean over the instances."""
    box_area: float
    """The fraction of the image that the box covers."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", type=int, default=8, help="the first with instances (default 8)")
        parser.add_argument("--instances", type=int, default=4, help="rows of a picture (default 4)")

    @classmethod
    def run(cls, models: Sequence[Distillation], output: str, *, images: int = 8, instances: int = 4) -> Self:
        check_at_least("--images", images, 1)
        check_at_least("--instances", instances, 1)
        (distillation,) = models
        model, icd = load_icd(distillation)
        check_output_folder(output, "--output")
        examples = read_examples(distillation.cfg, images)
        shares = []
        for example in examples:
            target = example["instances"].to(model.device)
            (attention,) = icd.attention_maps(model.teacher([example], icd.needs), [target])
            shares.append(torch.stack(share_inside(attention, target)).cpu())
            image = pixels(example, distillation.cfg)
            picture = draw_attention(image, target.to("cpu"), attention, distillation.class_names, instances)
            write_picture(os.path.join(output, picture_name(example)), picture)
        shares = torch.cat(shares, 1)
        return cls(len(examples), shares.shape[1], *shares.mean(1).tolist())

    def sentences(self) -> list[str]:
        return [
            f"{100 * self.share_in_box:.0f} % of an instance's attention lies in its box, which covers "
            f"{100 * self.box_area:.0f} % of the image (means of {self.instances} instances)."
        ]


def load_icd(distillation: Distillation) -> tuple[KDMetaArch, ICD]:
    """The teacher and the trained ICD of a checkpoint; the student stays as it is initialized.

    Raises:
        UserError: the config has no ICD, or the checkpoint no ICD of its kind.
    """
    if "ICD" not in distillation.cfg.MODEL.KD.DISTILLERS:
        raise UserError(
            f"--model {distillation.title} must be the config of a distillation with ICD in MODEL.KD.DISTILLERS."
        )
    state = distillation.distiller_states()["ICD"]
    model = distillation.build()
    try:
        model.distillers["ICD"].load_state_dict(state)
    except RuntimeError as error:
        reason = "it has none" if not state else str(error).splitlines()[1].strip()
        raise UserError(
            f"--model: {distillation.weights} does not hold the ICD decoder of this config: {reason}"
        ) from error
    return model, model.distillers["ICD"]


def draw_attention(
    image: np.ndarray, target: Instances, attention: dict[int, torch.Tensor], names: list[str], count: int
) -> np.ndarray:
    """A row for each of the `count` largest instances.

    Args:
        image: RGB (H, W, 3) uint8.
        attention: by stride (N, h, w).
    """
    plain = enlarged(image, SIDE)
    rows = []
    for n in target.gt_boxes.area().argsort(descending=True)[:count].tolist():
        density = {
            stride: per_pixel(level[n].cpu().numpy(), stride, target.image_size) / stride**2
            for stride, level in attention.items()
        }
        pictures = {
            "instance": draw_instances(image, target[[n]], names, min_side=SIDE),
            "all levels": overlay_heat(plain, sum(density.values())),
        }
        for stride, level in attention.items():
            title = f"stride {stride}: {100 * level[n].sum().item():.0f} %"
            pictures[title] = overlay_heat(plain, density[stride])
        rows.append([titled(picture, title) for title, picture in pictures.items()])
    return sheet(rows)


def share_inside(attention: dict[int, torch.Tensor], target: Instances) -> tuple[torch.Tensor, torch.Tensor]:
    """For each instance the fraction of its attention on cells with their center in its box, and the box's fraction of the image."""
    inside = 0
    for stride, level in attention.items():
        y, x = ((torch.arange(n, device=level.device) + 0.5) * stride for n in level.shape[-2:])
        left, top, right, bottom = target.gt_boxes.tensor[:, :, None].unbind(1)
        rows, columns = (y >= top) & (y <= bottom), (x >= left) & (x <= right)
        inside = inside + (level * rows[:, :, None] * columns[:, None]).sum((1, 2))
    return inside, target.gt_boxes.area() / (target.image_size[0] * target.image_size[1])
