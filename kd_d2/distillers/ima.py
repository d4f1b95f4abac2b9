"""IMA: masked features of the student are filled in again and aligned with the teacher's."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import roi_align

from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import mean_count_across_ranks
from ..errors import UserError
from ..losses import agreement, standardize
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    check_choice,
    in_float32,
    log_scalar,
)
from .generation import generation_blocks, random_mask
from .masks import inside_boxes
from .matching import levels_by_stride

MASKS = ("random", "instance", "none")
INSTANCES = ("sample", "box")
STANDARDIZED = ("both", "student", "none")
LEVELS = ("mean", "sum")


@DISTILLER_REGISTRY.register()
class IMA(Distiller):
    """Instance Mask Alignment: L = WEIGHT * mean over levels, or their sum, and (N, C, H, W) of (gamma * std(G(M * P(F_S))) - std(F_T))^2.

    P projects, M hides positions at random, G fills them in again; std brings every map of an instance to mean 0 and deviation
    1; gamma, the cosine of F_S and F_T (of P(F_S) where their channels differ), makes little of instances that do not agree. Every
    stage can be switched off.
    """

    needs = frozenset({"features", "targets"})
    loss_names = ("loss_ima",)
    CONFIG_NODE = "IMA"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # P, which also brings the student to the teacher's channels: "1x1", "3x3", or "none".
        node.ADAPTATION = "1x1"
        # Where positions are hidden: "random" over the map, inside the boxes of each "instance", or "none".
        node.MASK = "random"
        # zeta: the part that is hidden.
        node.MASK_RATIO = 0.65
        # G: two 3x3 convolutions, or nothing.
        node.GENERATION = True
        # What counts as an instance: a "sample" of the batch, or a ground-truth "box" (RoIAlign).
        node.INSTANCE = "sample"
        # Side of a box's features.
        node.BOX_RESOLUTION = 7
        # Whose features are standardised: of "both", of the "student", or "none".
        node.STANDARDIZE = "both"
        # Multiply the student's by gamma.
        node.DEFLATE = True
        # Over levels the "mean" or the "sum". The paper writes one level.
        node.LEVELS = "mean"

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, ADAPTATION_KERNELS)
        check_choice(cls.CONFIG_NODE, "MASK", node.MASK, MASKS)
        check_choice(cls.CONFIG_NODE, "INSTANCE", node.INSTANCE, INSTANCES)
        check_choice(cls.CONFIG_NODE, "STANDARDIZE", node.STANDARDIZE, STANDARDIZED)
        check_choice(cls.CONFIG_NODE, "LEVELS", node.LEVELS, LEVELS)
        if not 0 <= node.MASK_RATIO < 1:
            raise UserError(f"MODEL.KD.IMA.MASK_RATIO is {node.MASK_RATIO}; it must be from 0 to below 1.")
        if node.BOX_RESOLUTION < 1:
            raise UserError(f"MODEL.KD.IMA.BOX_RESOLUTION is {node.BOX_RESOLUTION}; it must be at least 1.")

    @configurable
    def __init__(
        self,
        *,
        weight: float,
        adaptation: AdaptationLayers,
        generation_channels: dict[int, int] | None,
        mask: str = "random",
        mask_ratio: float = 0.65,
        instance: str = "sample",
        box_resolution: int = 7,
        standardized: str = "both",
        deflate: bool = True,
        sum_levels: bool = False,
    ):
        """
        Args:
            weight: of the loss.
            adaptation: the layers P; its strides are the levels that are compared.
            generation_channels: of G by stride; None leaves G out.
            mask, mask_ratio, instance, box_resolution, standardized, deflate: see the keys.
            sum_levels: add the levels' losses up, in place of their mean.
        """
        super().__init__()
        self.weight = weight
        self.adaptation = adaptation
        self.generation = generation_blocks(generation_channels or {})
        self.mask = mask
        self.mask_ratio = mask_ratio
        self.instance = instance
        self.box_resolution = box_resolution
        self.standardized = standardized
        self.deflate = deflate
        self.sum_levels = sum_levels

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.IMA
        adaptation = AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher)
        channels = {stride: teacher.shapes[stride].channels for stride in adaptation.strides}
        return {
            "weight": node.WEIGHT,
            "adaptation": adaptation,
            "generation_channels": channels if node.GENERATION else None,
            "mask": node.MASK,
            "mask_ratio": node.MASK_RATIO,
            "instance": node.INSTANCE,
            "box_resolution": node.BOX_RESOLUTION,
            "standardized": node.STANDARDIZE,
            "deflate": node.DEFLATE,
            "sum_levels": node.LEVELS == "sum",
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        masks, pairs = self._masks(student, targets), self.adaptation.pairs(student, teacher)
        errors, scales = [], []
        for stride, mask, (s, t) in zip(self.adaptation.strides, masks, pairs, strict=True):
            filled, aim = (self._instances(x, targets, stride) for x in (self._fill(s * mask[:, None], stride), t))
            scale = None
            if self.deflate:
                own = student.features[stride]
                scale = agreement(self._instances(own if own.shape == t.shape else s, targets, stride), aim)
                scales.append(scale)
            errors.append(self.aligned_errors(filled, aim, scale))
        if scales and scales[0].numel():
            log_scalar("ima_gamma", lambda: torch.stack(scales).mean())
        error_LN = torch.stack(errors)
        count = mean_count_across_ranks(error_LN.new_full((), error_LN.shape[1]))
        error_N = error_LN.sum(0) if self.sum_levels else error_LN.mean(0)
        return {"loss_ima": self.weight * error_N.sum() / count}

    def _masks(self, student: DetectorOutputs, targets: list[Instances]) -> list[Tensor]:
        """M by level, (B, H, W) of zeros and ones."""
        maps = levels_by_stride(student.features, self.adaptation.strides, "student")
        if self.mask == "none":
            return [x.new_ones(()).expand(len(x), *x.shape[-2:]) for x in maps]
        shown = [random_mask(x, self.mask_ratio) for x in maps]
        if self.mask == "random":
            return shown
        inside = inside_boxes(student, targets, self.adaptation.strides)
        return [torch.maximum(seen, 1 - box.to(seen.dtype)) for seen, box in zip(shown, inside, strict=True)]

    def _fill(self, maps: Tensor, stride: int) -> Tensor:
        return self.generation[str(stride)](maps) if self.generation else maps

    def _instances(self, maps: Tensor, targets: list[Instances], stride: int) -> Tensor:
        """What the loss compares, (N, C, H, W): samples or boxes."""
        if self.instance == "sample":
            return maps
        boxes = [target.gt_boxes.tensor for target in targets]
        return roi_align(maps.float(), boxes, self.box_resolution, 1 / stride, sampling_ratio=2, aligned=True)

    @in_float32
    def aligned_errors(self, student_NCHW: Tensor, teacher_NCHW: Tensor, gamma_N: Tensor | None) -> Tensor:
        """The mean squared error of each aligned instance (N,); gamma is 1 where it is None."""
        if self.standardized != "none":
            student_NCHW = standardize(student_NCHW)
        if self.standardized == "both":
            teacher_NCHW = standardize(teacher_NCHW)
        if gamma_N is not None:
            student_NCHW = gamma_N[:, None, None, None] * student_NCHW
        return (student_NCHW - teacher_NCHW).square().mean((1, 2, 3))
