"""FKD: feature distillation with attention and non-local relations.

Shape suffixes: B images, C channels, H W map, S levels, L positions of all levels, M pairs of maps.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..distributed import mean_across_ranks
from ..keys import Above, AtLeast, OneOf
from ..losses.attention import activations_of_levels, means_of_levels, shared_attention_of_levels
from ..losses.flat_levels import FlatLevels, flatten_levels
from ..losses.focal import attended_square
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .non_local import NonLocalBlock, affine_matrices, composed, non_local_matrices, split
from .pair import Pair

ATTENTION, FEATURE, RELATION = (f"loss_fkd_{part}" for part in ("attention", "feature", "relation"))
SQUARE_EPS = 1e-24
"""Squared distances below it are treated as zero and have no gradient."""


def _root(squares: Tensor) -> Tensor:
    """Return the square root, with a gradient of 0 where there is no difference."""
    return squares.clamp(min=SQUARE_EPS).sqrt()


def _mean_norm(squares_BM: Tensor) -> Tensor:
    """Return the L2 norms averaged over images."""
    return _root(squares_BM).mean(0).sum()


def _norm_of_batch(squares_BM: Tensor) -> Tensor:
    """Return the L2 norms of the images of all ranks together.

    Each rank returns a value whose mean across ranks is the norm; the same holds for the gradients.
    """
    own_M = squares_BM.sum(0)
    ranks = comm.get_world_size()
    parts_M = ranks * own_M / _root(mean_across_ranks(own_M.detach()) * ranks)
    return ((parts_M + parts_M.detach()) / 2).sum()


NORMS_OF_IMAGES = {"image": _mean_norm, "batch": _norm_of_batch}
"""Functions from the squared distances of M pairs of maps in each image to the sum of M norms, by value of NORM."""


@DISTILLER_REGISTRY.register()
class FKD(Distiller):
    """Feature-based knowledge distillation (Zhang and Ma 2021).

    Unsquared L2 norms per image and level, summed over levels and averaged over images (in the authors' code, norms of
    the whole batch), times WEIGHT:

    - attention transfer (equation 4): distances of spatial attention mean_c |F| and channel attention mean_hw |F|; or,
      in the authors' code, of means without |.|, the student's passed through a 3x3 convolution and a linear layer;
    - masked features (equation 5): distance of phi(F_S) and F_T, each element weighted by the square root of spatial
      times channel mask, the softmax attention of both detectors;
    - relations (equation 7): distance of the outputs of non-local blocks on each detector's features.

    Attention transfer and relations are skipped if their weight is 0.
    """

    needs = frozenset({"features"})
    loss_names = (ATTENTION, FEATURE, RELATION)
    CONFIG_NODE = "FKD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        attention_weight: Annotated[float, AtLeast(0), "Weight of the attention transfer."] = 4e-3
        feature_weight: Annotated[float, AtLeast(0), "Weight of the masked features."] = 7e-5
        relation_weight: Annotated[float, AtLeast(0), "Weight of the relations."] = 7e-5
        temperature: Annotated[
            float,
            Above(0),
            "Temperature of the mask softmax; 0.5 in the paper and the authors' two-stage code, 0.1 in their one-stage code.",
        ] = 0.5
        attention: Annotated[
            Literal["absolute", "adapted"],
            "Attention to transfer: the means of |F| (as in the paper), or the means of F, the student's passed through additional layers "
            "(as in the authors' code).",
        ] = "absolute"
        norm: Annotated[
            str,
            OneOf(*NORMS_OF_IMAGES),
            "Whether norms are computed per image and averaged (as in the paper), or over the whole batch (as in the authors' code, whose "
            "one-stage version also uses 6 times the weights).",
        ] = "image"
        relation_dim: Annotated[int, AtLeast(1), "Inner channels of the non-local blocks."] = 64
        adaptation: Adaptation = "1x1"

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        weights = config.attention_weight, config.feature_weight, config.relation_weight
        self.weights = self.weigh_losses(*weights, optional=(ATTENTION, RELATION))
        self.norm_of_images = NORMS_OF_IMAGES[config.norm]
        compared = self.adaptation.compared_channels
        channels_of = {stride: (ours, compared[stride]) for stride, (ours, _) in pair.channels.items()}
        self.attention_adaptation = nn.ModuleDict()
        if config.attention == "adapted" and ATTENTION in self.weights:
            for stride, channels in channels_of.items():
                self.attention_adaptation[str(stride)] = AttentionAdaptation(*channels)
        self.student_relations, self.teacher_relations, self.relation_adaptation = (nn.ModuleDict() for _ in range(3))
        if RELATION in self.weights:
            for stride, (ours, theirs) in channels_of.items():
                self.student_relations[str(stride)] = NonLocalBlock(ours, config.relation_dim)
                self.teacher_relations[str(stride)] = NonLocalBlock(theirs, config.relation_dim)
                self.relation_adaptation[str(stride)] = nn.Conv2d(ours, theirs, 1)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        squares = defaultdict(list)
        for strides, ours, theirs in self.adaptation.groups(student, teacher):
            levels = FlatLevels.of(theirs)
            own = [student.features[stride] for stride in strides]
            adapted = self.adapted_attention(*own, strides=strides) if self.attention_adaptation else None
            of_levels = self.flat_squares(flatten_levels(ours), flatten_levels(theirs), adapted, levels)
            for name, squares_BM in of_levels.items():
                squares[name].append(squares_BM)
            if RELATION in self.weights:
                squares[RELATION].append(self.relation_squares(*own, *theirs, strides=strides, levels=levels))
        return {
            name: weight * self.norm_of_images(torch.cat(squares[name], 1)) for name, weight in self.weights.items()
        }

    @in_float32
    def adapted_attention(self, *maps: Tensor, strides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Compute the student's adapted means over channels, (B, 1, L), and over the positions of each level, (B, S, C).

        Args:
            maps: the student's levels before their adaptation layers.
        """
        layers = (self.attention_adaptation[str(stride)] for stride in strides)
        over_channels, over_positions = zip(*(layer(x) for layer, x in zip(layers, maps, strict=True)), strict=True)
        return flatten_levels(over_channels), torch.stack(over_positions, 1)

    @in_float32
    def flat_squares(
        self, student_BCL: Tensor, teacher_BCL: Tensor, adapted: tuple[Tensor, Tensor] | None, levels: FlatLevels
    ) -> dict[str, Tensor]:
        """Compute the squared distances of the masked features, (B, S), and of the attention, (B, 2 S).

        Args:
            student_BCL, teacher_BCL: maps of S levels.
            adapted: result of `adapted_attention`; None if the means of |F| are the attention.
            levels: their sizes.
        """
        activations = [activations_of_levels(x_BCL, levels) for x_BCL in (student_BCL, teacher_BCL)]
        mask_BL, mask_BSC = shared_attention_of_levels(*activations, self.config.temperature, levels)
        error_BL = mask_BL * attended_square(student_BCL - teacher_BCL, mask_BSC, levels)
        squares = {FEATURE: levels.sum(error_BL[:, None]).squeeze(2)}
        if ATTENTION in self.weights:
            attention = activations if adapted is None else (adapted, means_of_levels(teacher_BCL, levels))
            positions_B1L, channels_BSC = (ours - theirs for ours, theirs in zip(*attention, strict=True))
            over_positions_BS = levels.sum(positions_B1L.square()).squeeze(2)
            squares[ATTENTION] = torch.cat([over_positions_BS, channels_BSC.square().sum(2)], 1)
        return squares

    @in_float32
    def relation_squares(self, *maps: Tensor, strides: tuple[int, ...], levels: FlatLevels) -> Tensor:
        """Compute the squared distances of the relations, (B, S).

        Args:
            maps: the student's levels before their adaptation layers, then the teacher's.
            strides, levels: their strides and sizes.
        """
        names = [str(stride) for stride in strides]
        flat = [x_BCHW.flatten(2) for x_BCHW in maps]
        ours, theirs = flat[: len(names)], flat[len(names) :]
        related = non_local_matrices([self.student_relations[name] for name in names], ours, levels)
        adapted = composed(affine_matrices([self.relation_adaptation[name] for name in names]), related)
        target = non_local_matrices([self.teacher_relations[name] for name in names], theirs, levels)
        (weights_s, bias_s), (weights_t, bias_t) = split(adapted), split(target)
        differences = (
            torch.baddbmm(torch.baddbmm(bias, weight_t, t), weight_s, s, beta=-1)
            for bias, weight_t, t, weight_s, s in zip(bias_t - bias_s, weights_t, theirs, weights_s, ours, strict=True)
        )
        return torch.stack([torch.linalg.vector_norm(x_BCL, dim=(1, 2)) for x_BCL in differences], 1).square()


class AttentionAdaptation(nn.Module):
    """Applies a 3x3 convolution to a map's mean over channels and a linear layer to its mean over positions.

    Args:
        student, teacher: channels.
    """

    def __init__(self, student: int, teacher: int):
        super().__init__()
        self.positions = nn.Conv2d(1, 1, 3, padding=1)
        self.channels = nn.Linear(student, teacher)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the adapted means (B, 1, H, W) and (B, C_teacher)."""
        return self.positions(x_BCHW.mean(1, keepdim=True)), self.channels(x_BCHW.mean((2, 3)))
