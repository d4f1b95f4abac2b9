"""MGD: generation of the teacher's features from the student's partly masked features (Yang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch.nn.functional as F
from detectron2.structures import Instances

from ..adapters import DetectorOutputs
from ..keys import AtLeast, Below
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .generation import Residual, generation_blocks, random_mask
from .pair import NumLevels, Pair


@DISTILLER_REGISTRY.register()
class MGD(Distiller):
    """Masked generative distillation (Yang et al. 2022).

    L = WEIGHT * sum over levels and (B, C, H, W) of (G(M * phi(F_S)) - F_T)^2 / B

    M masks random positions; G, two 3x3 convolutions with a ReLU in between, regenerates them. With RESIDUAL (not in
    the paper) G adds its input to their output and starts as the identity, which a short training need not learn first.
    """

    needs = frozenset({"features"})
    loss_names = ("loss_mgd",)
    CONFIG_NODE = "MGD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Annotated[
            float | None,
            AtLeast(0),
            "Weight of the method's losses; None means 2e-5 for one-stage students and 5e-7 for others.",
        ] = None
        mask_ratio: Annotated[
            float | None,
            AtLeast(0),
            Below(1),
            "Fraction of the positions that is masked; None means 0.65 for one-stage students and 0.45 for others.",
        ] = None
        residual: Residual = False
        num_levels: NumLevels = None
        adaptation: Adaptation = None

    def __init__(self, config: Config, pair: Pair):
        is_one_stage = pair.student.family == "one-stage"
        super().__init__(config, pair, default_weight=2e-5 if is_one_stage else 5e-7)
        pair = pair.with_levels(config.num_levels)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        self.generation = generation_blocks(self.adaptation.compared_channels, residual=config.residual)
        published = 0.65 if is_one_stage else 0.45
        self.mask_ratio = published if config.mask_ratio is None else config.mask_ratio

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        losses = []
        for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True):
            filled = self.generation[str(stride)](s * random_mask(s, self.mask_ratio)[:, None])
            losses.append(sum_of_squares(filled, t) / len(s))
        return {"loss_mgd": sum(losses)}


sum_of_squares = in_float32(partial(F.mse_loss, reduction="sum"))
