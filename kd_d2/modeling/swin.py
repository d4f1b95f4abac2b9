"""Detectron2's Swin Transformer (Liu et al. 2021) as a bottom-up network in YAML configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SwinTransformer
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..errors import UserError
from ..keys import Above, AtLeast, Below, Keys
from .necks import register_with_fpns

STAGES = ("res2", "res3", "res4", "res5")


@dataclass(frozen=True)
class SwinKeys(Keys):
    """Config keys of Swin Transformers; MODEL.BACKBONE.FREEZE_AT and MODEL.RESNETS.OUT_FEATURES apply too."""

    embed_dim: Annotated[
        int, AtLeast(1), "Channels of the first stage; each stage has twice those of the one before."
    ] = 96
    depths: Annotated[tuple[int, int, int, int], AtLeast(1), "Number of blocks in each stage."] = (2, 2, 6, 2)
    num_heads: Annotated[
        tuple[int, int, int, int], AtLeast(1), "Number of attention heads in each stage, which divides its channels."
    ] = (3, 6, 12, 24)
    window_size: Annotated[int, AtLeast(1), "Side of the windows in which positions attend to each other."] = 7
    mlp_ratio: Annotated[float, Above(0), "Channels in the MLP of a block, relative to its other channels."] = 4.0
    drop_path_rate: Annotated[float, AtLeast(0), Below(1), "Rate of stochastic depth in the last block."] = 0.2

    def check(self, name: str) -> None:
        for index, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**index % heads:
                raise UserError(
                    f"{name}.NUM_HEADS is {self.num_heads}; {heads} heads do not divide the {self.embed_dim * 2**index} channels of stage "
                    f"{index + 1}."
                )


class Swin(SwinTransformer):
    """Detectron2's Swin Transformer with the stages' names of its ResNets, and stochastic depth without timm.

    Args:
        out_features: stages to return, from res2, res3, res4 and res5.
        freeze_at: freeze nothing (0), the patch embedding (1), also the first stage (2), and so on.
        drop_path_rate: rate of stochastic depth in the last block; it increases linearly from 0 in the first one.
        arguments: those of Detectron2's `SwinTransformer`.
    """

    def __init__(self, out_features: list[str], freeze_at: int, drop_path_rate: float, **arguments: Any):
        indices = tuple(STAGES.index(stage) for stage in out_features)
        super().__init__(out_indices=indices, drop_path_rate=0.0, frozen_stages=freeze_at or -1, **arguments)
        blocks = [block for layer in self.layers for block in layer.blocks]
        for block, rate in zip(blocks, torch.linspace(0, drop_path_rate, len(blocks)).tolist(), strict=True):
            block.drop_path = StochasticDepth(rate, "row")
        self._out_features = list(out_features)
        self._out_feature_channels = {STAGES[i]: self.num_features[i] for i in indices}
        self._out_feature_strides = {STAGES[i]: 4 * 2**i for i in indices}

    @property
    def size_divisibility(self) -> int:
        return 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to the outputs of the stages in `out_features`, by name."""
        return {STAGES[int(name.removeprefix("p"))]: features for name, features in super().forward(x).items()}

    def parameters_without_weight_decay(self) -> set[nn.Parameter]:
        """Return the tables of relative positions, which its authors train without weight decay."""
        return {p for name, p in self.named_parameters() if name.endswith("relative_position_bias_table")}


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Swin:
    """Build a Swin Transformer from MODEL.SWIN."""
    keys = SwinKeys.read(cfg.MODEL.SWIN, "MODEL.SWIN")
    unknown = [stage for stage in cfg.MODEL.RESNETS.OUT_FEATURES if stage not in STAGES]
    if unknown:
        raise UserError(
            f"MODEL.RESNETS.OUT_FEATURES names {', '.join(unknown)}; a Swin Transformer has {', '.join(STAGES)}."
        )
    return Swin(
        list(cfg.MODEL.RESNETS.OUT_FEATURES),
        cfg.MODEL.BACKBONE.FREEZE_AT,
        keys.drop_path_rate,
        in_chans=input_shape.channels,
        embed_dim=keys.embed_dim,
        depths=keys.depths,
        num_heads=keys.num_heads,
        window_size=keys.window_size,
        mlp_ratio=keys.mlp_ratio,
    )


(
    build_swin_fpn_backbone,
    build_retinanet_swin_fpn_backbone,
    build_dense_swin_fpn_backbone,
) = register_with_fpns("swin", build_swin_backbone)
