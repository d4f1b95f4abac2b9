"""ReviewKD: the student's coarser levels are fused into the finer ones that imitate the teacher's (Chen et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..keys import AtLeast
from ..losses import hierarchical_context_loss
from .adaptation import AdaptationLayers, Selection
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .batch_norm import BatchNormOverAllRanks, check_positions
from .pair import NumLevels, Pair


@DISTILLER_REGISTRY.register()
class ReviewKD(Distiller):
    """Distillation via knowledge review (Chen et al. 2021).

    L = WEIGHT * sum over levels of HCL(G_l, F_T,l)

    From the coarsest level to the finest, each is fused with the coarser ones (`FusionBlock`); HCL compares the result G_l with
    the teacher's features at several resolutions (see `hierarchical_context_loss`). With RESIDUAL (not in the paper) G_l is the
    student's level plus the output of the fusion and starts as the level itself. The authors' weights are 1 for ResNet-50, 1.2
    for ResNet-18 and 2 for MobileNetV2 students.
    """

    needs = frozenset({"features"})
    loss_names = ("loss_reviewkd",)
    CONFIG_NODE = "REVIEWKD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        adaptation: Selection = None
        mid_channels: Annotated[
            int | None,
            AtLeast(1),
            "Channels in which levels are fused; None means as many as the teacher's levels have.",
        ] = None
        residual: Annotated[
            bool | None,
            "Whether the student's features are added to the fused output, which starts as zero; the paper's are not. None means True "
            "if they have as many channels as are imitated.",
        ] = False
        num_levels: NumLevels = None

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        pair = pair.with_levels(config.num_levels)
        self.adaptation = AdaptationLayers.without_convolutions(config.adaptation, pair, self.CONFIG_NODE)
        imitated = self.adaptation.compared_channels
        self.is_residual = self.adaptation.is_residual(config.residual, self.CONFIG_NODE)
        mid = config.mid_channels or max(theirs for _, theirs in pair.channels.values())
        coarsest = max(pair.channels)
        self.blocks = nn.ModuleDict({
            str(stride): FusionBlock(ours, mid, imitated[stride], fuses=stride != coarsest)
            for stride, (ours, _) in pair.channels.items()
        })  # fmt: skip
        if self.is_residual:
            for block in self.blocks.values():
                nn.init.zeros_(block.expand[-1].weight)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        losses, coarser = [], None
        from_fine = zip(self.adaptation.pairs(student, teacher), self.blocks.values(), strict=True)
        for (maps, imitated), block in reversed([*from_fine]):
            output, coarser = block(maps, coarser)
            losses.append(compare(maps + output if self.is_residual else output, imitated))
        return {"loss_reviewkd": sum(losses)}


compare = in_float32(hierarchical_context_loss)


class FusionBlock(nn.Module):
    """Attention-based fusion of a level with the coarser ones (Chen et al. 2021, figure 3a).

    Args:
        channels, mid, out: channels of the level, of the fused maps and of the output.
        fuses: whether there is a coarser level.
    """

    def __init__(self, channels: int, mid: int, out: int, *, fuses: bool):
        super().__init__()
        self.reduce = _conv_with_norm(channels, mid, 1)
        self.expand = _conv_with_norm(mid, out, 3)
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuses else None

    def forward(self, maps: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output (B, out, H, W) and the fused maps (B, mid, H, W).

        Args:
            maps: (B, channels, H, W).
            coarser: fused maps of the next coarser level.

        Raises:
            UserError: the normalization, over the batch and positions, has only one value per channel.
        """
        if self.training:
            check_positions(maps, "ReviewKD", ReviewKD.CONFIG_NODE)
        fused = self.reduce(maps)
        if self.attention is not None:
            coarser = F.interpolate(coarser, fused.shape[-2:], mode="nearest")
            own_share, coarser_share = self.attention(torch.cat([fused, coarser], 1)).sigmoid().split(1, 1)
            fused = own_share * fused + coarser_share * coarser
        return self.expand(fused), fused


def _conv_with_norm(channels: int, out: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, BatchNormOverAllRanks(out))
