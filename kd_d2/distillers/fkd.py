"""FKD: feature distillation with attention and non-local relations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..distributed import mean_across_ranks
from ..keys import Above, AtLeast, OneOf
from ..losses import mean_activation, shared_attention
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .pair import Pair
from .pointwise import pointwise

ATTENTION, FEATURE, RELATION = (f"loss_fkd_{part}" for part in ("attention", "feature", "relation"))
SQUARE_EPS = 1e-24
"""Squared distances below it are treated as zero and have no gradient."""


def _mean_norm(difference: Tensor) -> Tensor:
    """Return the L2 norm averaged over images, with a gradient of 0 where there is no difference."""
    return torch.linalg.vector_norm(difference.flatten(1), dim=1).mean()


def _norm_of_batch(difference: Tensor) -> Tensor:
    """Return the L2 norm of the images of all ranks together, with a gradient of 0 where there is no difference.

    Each rank returns a value whose mean across ranks is the norm; the same holds for the gradients.
    """
    own = difference.square().sum()
    mean = mean_across_ranks(own.detach())
    ranks = comm.get_world_size()
    norm = (mean * ranks).clamp(min=SQUARE_EPS).sqrt()
    part = ranks * own / norm
    return (part + part.detach()) / 2


Activations = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Mean activations of student and teacher (B, 1, H, W), then of both (B, C, 1, 1)."""
NORMS_OF_IMAGES = {"image": _mean_norm, "batch": _norm_of_batch}
"""Functions from the difference of two maps (B, ...) to its norm, by value of the key NORM."""


def mean_activations(student: Tensor, teacher: Tensor) -> Activations:
    return tuple((mean_activation(student, dims), mean_activation(teacher, dims)) for dims in (1, (2, 3)))


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
        self.attention_adaptation = nn.ModuleDict()
        if config.attention == "adapted" and ATTENTION in self.weights:
            for stride, channels in pair.channels.items():
                self.attention_adaptation[str(stride)] = AttentionAdaptation(*channels)
        self.student_relations, self.teacher_relations, self.relation_adaptation = (nn.ModuleDict() for _ in range(3))
        if RELATION in self.weights:
            for stride, (ours, theirs) in pair.channels.items():
                self.student_relations[str(stride)] = NonLocalBlock(ours, config.relation_dim)
                self.teacher_relations[str(stride)] = NonLocalBlock(theirs, config.relation_dim)
                self.relation_adaptation[str(stride)] = nn.Conv2d(ours, theirs, 1)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        totals = dict.fromkeys(self.weights, 0.0)
        for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True):
            level = student.features[stride]
            activations = mean_activations(s, t)
            totals[FEATURE] += self.feature_distance(s, t, activations)
            if ATTENTION in totals:
                totals[ATTENTION] += self.attention_distance(level, t, activations, str(stride))
            if RELATION in totals:
                totals[RELATION] += self.relation_distance(level, t, str(stride))
        return {name: weight * totals[name] for name, weight in self.weights.items()}

    @in_float32
    def attention_distance(
        self, own_BCHW: Tensor, teacher_BCHW: Tensor, activations: Activations, stride: str
    ) -> Tensor:
        """Compute the sum of the distances of spatial and channel attention.

        Args:
            own_BCHW: the student's map before its adaptation layer.
        """
        if self.attention_adaptation:
            theirs = [teacher_BCHW.mean(dims) for dims in (1, (2, 3))]
            activations = zip(self.attention_adaptation[stride](own_BCHW), theirs, strict=True)
        return sum(self.norm_of_images(ours - theirs) for ours, theirs in activations)

    @in_float32
    def feature_distance(self, student_BCHW: Tensor, teacher_BCHW: Tensor, activations: Activations) -> Tensor:
        """Compute the distance of the masked features."""
        positions_B1HW, channels_BC11 = (shared_attention(*pair, self.config.temperature) for pair in activations)
        squares_BCL = (student_BCHW - teacher_BCHW).square().flatten(2)
        by_channel_BC1 = squares_BCL @ positions_B1HW.flatten(2).transpose(1, 2)
        masked_B = (by_channel_BC1.flatten(1) * channels_BC11.flatten(1)).sum(1)
        return self.norm_of_images(masked_B.clamp(min=SQUARE_EPS).sqrt()[:, None])

    @in_float32
    def relation_distance(self, student_BCHW: Tensor, teacher_BCHW: Tensor, stride: str) -> Tensor:
        """Compute the distance of the relations."""
        ours = pointwise(self.relation_adaptation[stride], self.student_relations[stride](student_BCHW).flatten(2))
        return self.norm_of_images(ours - self.teacher_relations[stride](teacher_BCHW).flatten(2))


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
        """Return the adapted means (B, H, W) and (B, C_teacher)."""
        return self.positions(x_BCHW.mean(1, keepdim=True))[:, 0], self.channels(x_BCHW.mean((2, 3)))


class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al. 2018, dot product): x + W(mean over positions of <theta(x), phi(x')> g(x')).

    W is initialized to zero, so that the block starts as the identity.

    Args:
        channels: channels of the maps.
        dim: channels of theta, phi and g.
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, dim, 1) for _ in range(3))
        self.out = nn.Conv2d(dim, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCL = x_BCHW.flatten(2)
        phi_BDL, g_BDL = (pointwise(layer, x_BCL) for layer in (self.phi, self.g))
        # <theta, phi> g = theta (phi g): neither the matrix of all pairs of positions nor theta's map is materialized.
        related_BDD = g_BDL @ phi_BDL.transpose(1, 2) / phi_BDL.shape[-1]
        weight_BDC = related_BDD @ self.theta.weight.flatten(1)
        gathered_BDL = torch.baddbmm(related_BDD @ self.theta.bias[:, None], weight_BDC, x_BCL)
        return x_BCHW + pointwise(self.out, gathered_BDL).view_as(x_BCHW)
