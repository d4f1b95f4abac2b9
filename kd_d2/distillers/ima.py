"""IMA: alignment of the student's masked and regenerated features with the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import roi_align

from ..adapters import DetectorOutputs
from ..distributed import mean_count_across_ranks
from ..errors import UserError
from ..keys import AtLeast, Below
from ..losses import agreement, standardize
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32, log_scalar
from .generation import Residual, generation_blocks, random_mask
from .masks import inside_boxes
from .pair import Pair


@DISTILLER_REGISTRY.register()
class IMA(Distiller):
    """Instance Mask Alignment: WEIGHT * mean or sum over levels of mean of (gamma * std(G(M * P(F_S))) - std(F_T))^2.

    The mean is over (N, C, H, W). P projects, M masks random positions, G regenerates them; std standardizes each map
    of an instance to mean 0 and deviation 1; gamma, the cosine similarity of F_S and F_T, reduces the effect of
    instances that disagree. It is 1 if their channels differ. Every stage can be disabled. With RESIDUAL (not in the
    paper) G adds its input to its output and starts as the identity.
    """

    needs = frozenset({"features", "targets"})
    loss_names = ("loss_ima",)
    CONFIG_NODE = "IMA"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        adaptation: Annotated[
            Adaptation, "Projection, which also maps the student's features to the teacher's channels (P)."
        ] = "1x1"
        mask: Annotated[
            Literal["random", "instance", "none"],
            "Where positions are masked: over the whole map, inside the boxes of each instance, or nowhere.",
        ] = "random"
        mask_ratio: Annotated[float, AtLeast(0), Below(1), "Fraction of the positions that is masked (zeta)."] = 0.65
        generation: Annotated[bool, "Whether masked positions are regenerated, by two 3x3 convolutions (G)."] = True
        residual: Residual = False
        instance: Annotated[
            Literal["sample", "box"],
            "What counts as an instance: a sample of the batch, or a ground-truth box (RoIAlign).",
        ] = "sample"
        box_resolution: Annotated[int, AtLeast(1), "RoIAlign output size of a box."] = 7
        standardize: Annotated[Literal["both", "student", "none"], "Whose features are standardized."] = "both"
        deflate: Annotated[
            bool,
            "Whether the student's features are multiplied by their cosine similarity to the teacher's (gamma); "
            "they are not at levels where the channels differ.",
        ] = True
        levels: Annotated[
            Literal["mean", "sum"], "Whether the loss is the mean or the sum over levels; the paper defines one level."
        ] = "mean"

        def check(self, name: str) -> None:
            if self.instance == "box" and self.box_resolution == 1 and self.standardize != "none":
                raise UserError(
                    f"{name}.BOX_RESOLUTION is 1, but STANDARDIZE {self.standardize!r} makes a box of one cell zero: set STANDARDIZE "
                    "to 'none' or a larger BOX_RESOLUTION."
                )

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        self.generation = generation_blocks(
            self.adaptation.compared_channels if config.generation else {}, config.residual
        )

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        pairs, masks = self.adaptation.pairs(student, teacher), self._masks(student, targets)
        errors, scales = [], []
        for stride, mask, (s, t) in zip(self.adaptation.strides, masks, pairs, strict=True):
            filled, aim = (self._instances(x, targets, stride) for x in (self._fill(s * mask[:, None], stride), t))
            scale = None
            own = student.features[stride]
            if self.config.deflate and own.shape == t.shape:
                scale = agreement(self._instances(own, targets, stride), aim)
                scales.append(scale)
            errors.append(self.aligned_errors(filled, aim, scale))
        if scales and scales[0].numel():
            log_scalar("ima_gamma", lambda: torch.stack(scales).mean())
        error_LN = torch.stack(errors)
        count = mean_count_across_ranks(error_LN.new_full((), error_LN.shape[1]))
        error_N = error_LN.sum(0) if self.config.levels == "sum" else error_LN.mean(0)
        return {"loss_ima": error_N.sum() / count}

    def _masks(self, student: DetectorOutputs, targets: list[Instances]) -> list[Tensor]:
        """Return M by level, (B, H, W) of zeros and ones."""
        maps = [student.features[stride] for stride in self.adaptation.strides]
        if self.config.mask == "none":
            return [x.new_ones(()).expand(len(x), *x.shape[-2:]) for x in maps]
        shown = [random_mask(x, self.config.mask_ratio) for x in maps]
        if self.config.mask == "random":
            return shown
        inside = inside_boxes(student, targets, self.adaptation.strides)
        return [torch.maximum(seen, 1 - box.to(seen.dtype)) for seen, box in zip(shown, inside, strict=True)]

    def _fill(self, maps: Tensor, stride: int) -> Tensor:
        return self.generation[str(stride)](maps) if self.generation else maps

    def _instances(self, maps: Tensor, targets: list[Instances], stride: int) -> Tensor:
        """Return what the loss compares, (N, C, H, W): samples or boxes."""
        if self.config.instance == "sample":
            return maps
        boxes = [target.gt_boxes.tensor for target in targets]
        return roi_align(maps.float(), boxes, self.config.box_resolution, 1 / stride, sampling_ratio=2, aligned=True)

    @in_float32
    def aligned_errors(self, student_NCHW: Tensor, teacher_NCHW: Tensor, gamma_N: Tensor | None) -> Tensor:
        """Compute the mean squared error (N,) of each aligned instance; None for gamma means 1."""
        if self.config.standardize != "none":
            student_NCHW = standardize(student_NCHW)
        if self.config.standardize == "both":
            teacher_NCHW = standardize(teacher_NCHW)
        if gamma_N is not None:
            student_NCHW = gamma_N[:, None, None, None] * student_NCHW
        return (student_NCHW - teacher_NCHW).square().mean((1, 2, 3))
