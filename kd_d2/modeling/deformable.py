"""Deformable convolutions that run on any device and can be exported."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.modeling.backbone import resnet
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

_REPLACING = threading.RLock()


class DeformableConv(DeformConv2d):
    """Torchvision's deformable convolution with the arguments of Detectron2's (Dai et al. 2017; modulated: Zhu et al. 2019).

    It runs in float32 even under autocast. Offsets that are NaN, as in a training that diverges, count as 0: torchvision
    would read memory outside of the maps.

    Args:
        arguments, keywords: those of `torchvision.ops.DeformConv2d`.
        deformable_groups: number of groups of channels with offsets of their own; the offsets' shape determines it too.
        norm: normalization layer.
        activation: applied to the output.
    """

    def __init__(
        self,
        *arguments: Any,
        deformable_groups: int = 1,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        **keywords: Any,
    ):
        super().__init__(*arguments, **keywords)
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map features (B, C, H, W) to features (B, C', H', W').

        Args:
            offset: (B, 2 * groups * points, H', W'), y before x for each point of the kernel, in positions of `x`.
            mask: (B, groups * points, H', W'), factors of the sampled values; None for 1.
        """
        with torch.autocast(x.device.type, enabled=False):
            mask = None if mask is None else mask.float()
            x = super().forward(x.float(), offset.float().nan_to_num(0.0), mask)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class ModulatedDeformableConv(DeformableConv):
    """3x3 convolution with offsets and factors that another one predicts from the same features (Zhu et al. 2019).

    It starts with offsets 0 and factors 0.5.

    Args:
        channels: number of channels of input and output.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)
        self.conv_offset = nn.Conv2d(channels, 27, 3, padding=1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, C, H, W) to features of the same shape."""
        offset, logits = self.conv_offset(x).split((18, 9), 1)
        return super().forward(x, offset, logits.sigmoid())


@contextlib.contextmanager
def deformable_resnets() -> Iterator[None]:
    """Build Detectron2's ResNets with `DeformableConv`; those of Detectron2 need its compiled operators, and partly a GPU.

    Other threads that enter this context wait until it is left, since it replaces names in Detectron2's module.
    """
    with _REPLACING:
        replaced = {name: getattr(resnet, name) for name in ("DeformConv", "ModulatedDeformConv")}
        try:
            for name in replaced:
                setattr(resnet, name, DeformableConv)
            yield
        finally:
            for name, layer in replaced.items():
                setattr(resnet, name, layer)
