"""`kd-d2 analyze attention`: the attention of ICD's decoder over the feature levels, by instance."""

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
from ..errors import UserError, check_at_least
from ..files import check_output_folder
from ..meta_arch import KDMetaArch
from .base import Analysis
from .drawing import draw_instances, enlarged, overlay_heat, per_pixel, sheet, titled, write_picture
from .examples import picture_names, pixels, read_examples
from .models import Distillation, load_distillations

SIDE = 200  # shorter side of a picture, in pixels


@dataclass
class AttentionAnalysis(Analysis):
    """The attention of ICD's decoder over the feature levels, drawn on images of the test set.

    The model is a distillation with ICD and a checkpoint of its training. The output folder contains one picture per
    image, with one row per instance: the box, the attention over all levels, and the attention of each level scaled to
    its maximum. attention.json has the mean fraction of an instance's attention inside its box.
    """

    name = "attention"
    title = "Attention of ICD's decoder"
    file = "attention.json"
    model_count = (1, 1)
    read_models = staticmethod(partial(load_distillations, train=True))

    images: int
    instances: int
    share_in_box: float
    """The fraction of an instance's attention inside its box, averaged over the instances."""
    box_area: float
    """The fraction of the image covered by the box, averaged over the instances."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", type=int, default=8, help="number of test images with instances (default 8)")
        parser.add_argument("--instances", type=int, default=4, help="number of rows in a picture (default 4)")

    @classmethod
    def run(cls, models: Sequence[Distillation], output: str, *, images: int = 8, instances: int = 4) -> Self:
        check_at_least("--images", images, 1)
        check_at_least("--instances", instances, 1)
        (distillation,) = models
        model, icd = load_icd(distillation)
        check_output_folder(output, "--output")
        examples = read_examples(distillation.cfg, images)
        names = picture_names(examples, output)
        cls.clear(output)
        shares = []
        for example, name in zip(examples, names, strict=True):
            target = example["instances"].to(model.device)
            (attention,) = icd.attention_maps(model.teacher([example], icd.needs), [target])
            shares.append(torch.stack(share_inside(attention, target)).cpu())
            image = pixels(example, distillation.cfg)
            picture = draw_attention(image, target.to("cpu"), attention, distillation.class_names, instances)
            write_picture(os.path.join(output, name), picture)
        shares = torch.cat(shares, 1)
        analysis = cls(len(examples), shares.shape[1], *shares.mean(1).tolist())
        analysis.picture_files = names
        return analysis

    def sentences(self) -> list[str]:
        return [
            f"{100 * self.share_in_box:.0f} % of an instance's attention lies in its box, which covers "
            f"{100 * self.box_area:.0f} % of the image (means of {self.instances} instances)."
        ]


def load_icd(distillation: Distillation) -> tuple[KDMetaArch, ICD]:
    """Load the model and the trained ICD of a checkpoint, without loading weights into the student.

    Raises:
        UserError: the config has no ICD, or the checkpoint has no matching ICD.
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
            f"--model: {distillation.weights} does not contain the ICD decoder of this config: {reason}"
        ) from error
    return model, model.distillers["ICD"]


def draw_attention(
    image: np.ndarray, target: Instances, attention: dict[int, torch.Tensor], names: list[str], count: int
) -> np.ndarray:
    """Draw one row for each of the `count` largest instances.

    Args:
        image: RGB (H, W, 3) uint8.
        attention: maps (N, h, w) by stride.
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
    """Return the fraction of each instance's attention in cells centered in its box, and the box's area fraction."""
    inside = 0
    for stride, level in attention.items():
        y, x = ((torch.arange(n, device=level.device) + 0.5) * stride for n in level.shape[-2:])
        left, top, right, bottom = target.gt_boxes.tensor[:, :, None].unbind(1)
        rows, columns = (y >= top) & (y <= bottom), (x >= left) & (x <= right)
        inside = inside + (level * rows[:, :, None] * columns[:, None]).sum((1, 2))
    return inside, target.gt_boxes.area() / (target.image_size[0] * target.image_size[1])
