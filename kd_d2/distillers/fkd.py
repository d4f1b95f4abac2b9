"""FKD: feature-based distillation by attention and non-local relations."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor, nn

from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import mean_across_ranks
from ..losses import shared_attention
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    check_choice,
    check_number,
    in_float32,
)
from .matching import levels_by_stride

SQUARE_EPS = 1e-24
"""Below it a squared distance counts as none, and has no gradient."""


ATTENTIONS = ("absolute", "adapted")


@DISTILLER_REGISTRY.register()
class FKD(Distiller):
    """Feature-based knowledge distillation (Zhang and Ma 2021).

    Of each image and level, with unsquared L2 norms, summed over levels and averaged over images (in the authors' program of the whole
    batch), times WEIGHT:

    - attention transfer (equation 4): distance of the spatial attention mean_c |F| and of the channel attention mean_hw |F|; or, as
      in the authors' program, of the means without |.|, the student's through a 3x3 convolution and a linear layer;
    - masked features (equation 5): of phi(F_S) and F_T, each element weighed by the square root of spatial times channel mask, the
      softmax attention of both detectors;
    - relations (equation 7): of what a non-local block makes of each detector's features.
    """

    needs = frozenset({"features"})
    loss_names = ("loss_fkd_attention", "loss_fkd_feature", "loss_fkd_relation")
    CONFIG_NODE = "FKD"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        node.ATTENTION_WEIGHT = 4e-3
        node.FEATURE_WEIGHT = 7e-5
        node.RELATION_WEIGHT = 7e-5
        # Of the masks' softmax. The paper has 0.5, the authors' programs 0.1.
        node.TEMPERATURE = 0.5
        # Attention that is transferred: "absolute", the means of |F| (the paper), or "adapted", those of F, the student's through layers
        # of their own (the authors' programs).
        node.ATTENTION = "absolute"
        # A norm is that of each "image", and their mean is taken (the paper), or of the whole "batch" (the authors' programs, whose
        # one-stage program also has 6 times the weights).
        node.NORM = "image"
        # Channels within a non-local block.
        node.RELATION_DIM = 64
        # phi, between student and teacher features: "none", "1x1" or "3x3".
        node.ADAPTATION = "1x1"

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, ADAPTATION_KERNELS)
        for key in ("ATTENTION_WEIGHT", "FEATURE_WEIGHT", "RELATION_WEIGHT"):
            check_number(cls.CONFIG_NODE, key, node[key], 0)
        check_choice(cls.CONFIG_NODE, "ATTENTION", node.ATTENTION, ATTENTIONS)
        check_choice(cls.CONFIG_NODE, "NORM", node.NORM, NORMS_OF_IMAGES)
        check_number(cls.CONFIG_NODE, "TEMPERATURE", node.TEMPERATURE, 0, exclusive=True)
        check_number(cls.CONFIG_NODE, "RELATION_DIM", node.RELATION_DIM, 1)

    @configurable
    def __init__(
        self,
        *,
        adaptation: AdaptationLayers,
        channels: dict[int, tuple[int, int]],
        attention_weight: float = 4e-3,
        feature_weight: float = 7e-5,
        relation_weight: float = 7e-5,
        temperature: float = 0.5,
        relation_dim: int = 64,
        adapted_attention: bool = False,
        norm: str = "image",
    ):
        """
        Args:
            adaptation: the layers phi; its strides are the levels that are compared.
            channels: by stride the student's and the teacher's.
            attention_weight, feature_weight, relation_weight: of the three losses.
            temperature: of the masks' softmax.
            relation_dim: channels within a non-local block.
            adapted_attention: see the key ATTENTION.
            norm: see the key NORM.
        """
        super().__init__()
        self.adaptation = adaptation
        self.weights = attention_weight, feature_weight, relation_weight
        self.temperature = temperature
        self.norm_of_images = NORMS_OF_IMAGES[norm]
        self.attention_adaptation = nn.ModuleDict()
        if adapted_attention:
            self.attention_adaptation = nn.ModuleDict(
                {str(stride): AttentionAdaptation(*pair) for stride, pair in channels.items()}
            )
        self.student_relations, self.teacher_relations, self.relation_adaptation = (nn.ModuleDict() for _ in range(3))
        for stride, (ours, theirs) in channels.items():
            self.student_relations[str(stride)] = NonLocalBlock(ours, relation_dim)
            self.teacher_relations[str(stride)] = NonLocalBlock(theirs, relation_dim)
            self.relation_adaptation[str(stride)] = nn.Conv2d(ours, theirs, 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.FKD
        adaptation = AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher)
        return {
            "adaptation": adaptation,
            "channels": {s: (student.shapes[s].channels, teacher.shapes[s].channels) for s in adaptation.strides},
            "attention_weight": node.WEIGHT * node.ATTENTION_WEIGHT,
            "feature_weight": node.WEIGHT * node.FEATURE_WEIGHT,
            "relation_weight": node.WEIGHT * node.RELATION_WEIGHT,
            "temperature": node.TEMPERATURE,
            "relation_dim": node.RELATION_DIM,
            "adapted_attention": node.ATTENTION == "adapted",
            "norm": node.NORM,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        totals = [0.0, 0.0, 0.0]
        own = levels_by_stride(student.features, self.adaptation.strides, "student")
        for stride, level, (s, t) in zip(
            self.adaptation.strides, own, self.adaptation.pairs(student, teacher), strict=True
        ):
            distances = (
                self.attention_distance(level, s, t, str(stride)),
                self.feature_distance(s, t),
                self.relation_distance(level, t, str(stride)),
            )
            totals = [total + distance for total, distance in zip(totals, distances, strict=True)]
        return {n: w * total for n, w, total in zip(self.loss_names, self.weights, totals, strict=True)}

    @in_float32
    def attention_distance(self, own_BCHW: Tensor, student_BCHW: Tensor, teacher_BCHW: Tensor, stride: str) -> Tensor:
        """The attention's distance: of the spatial and of the channel attention, added up.

        Args:
            own_BCHW, student_BCHW: the student's map before and behind its adaptation layer.
        """
        if self.attention_adaptation:
            ours = self.attention_adaptation[stride](own_BCHW)
            theirs = [teacher_BCHW.mean(dims) for dims in (1, (2, 3))]
        else:
            ours, theirs = ([x.abs().mean(dims) for dims in (1, (2, 3))] for x in (student_BCHW, teacher_BCHW))
        return sum(self.norm_of_images(a - b) for a, b in zip(ours, theirs, strict=True))

    @in_float32
    def feature_distance(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """The masked features' distance."""
        activations = student_BCHW.abs(), teacher_BCHW.abs()
        positions_B1HW, channels_BC11 = (
            shared_attention(*(x.mean(dims, keepdim=True) for x in activations), self.temperature)
            for dims in (1, (2, 3))
        )
        squares_BCL = (student_BCHW - teacher_BCHW).square().flatten(2)
        by_channel_BC1 = squares_BCL @ positions_B1HW.flatten(2).transpose(1, 2)
        masked_B = (by_channel_BC1.flatten(1) * channels_BC11.flatten(1)).sum(1)
        return self.norm_of_images(masked_B.clamp(min=SQUARE_EPS).sqrt()[:, None])

    @in_float32
    def relation_distance(self, student_BCHW: Tensor, teacher_BCHW: Tensor, stride: str) -> Tensor:
        """The relations' distance."""
        ours = _pointwise(self.relation_adaptation[stride], self.student_relations[stride](student_BCHW).flatten(2))
        return self.norm_of_images(ours - self.teacher_relations[stride](teacher_BCHW).flatten(2))


class AttentionAdaptation(nn.Module):
    """The means of a map over channels, through a 3x3 convolution, and over positions, through a linear layer.

    Args:
        student, teacher: channels.
    """

    def __init__(self, student: int, teacher: int):
        super().__init__()
        self.positions = nn.Conv2d(1, 1, 3, padding=1)
        self.channels = nn.Linear(student, teacher)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W) and (B, C_teacher)."""
        return self.positions(x_BCHW.mean(1, keepdim=True))[:, 0], self.channels(x_BCHW.mean((2, 3)))


class NonLocalBlock(nn.Module):
    """x + W(sum over positions of <theta(x), phi(x')> g(x') / their number) (Wang et al. 2018, dot product).

    W begins as zero, the block as the identity.

    Args:
        channels: of the maps.
        dim: of theta, phi and g.
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, dim, 1) for _ in range(3))
        self.out = nn.Conv2d(dim, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCL = x_BCHW.flatten(2)
        phi_BDL, g_BDL = (_pointwise(layer, x_BCL) for layer in (self.phi, self.g))
        # <theta, phi> g = theta (phi g): the matrix of all pairs of positions is never made, nor theta's map.
        related_BDD = g_BDL @ phi_BDL.transpose(1, 2) / phi_BDL.shape[-1]
        weight_BDC = related_BDD @ self.theta.weight.flatten(1)
        gathered_BDL = torch.baddbmm(related_BDD @ self.theta.bias[:, None], weight_BDC, x_BCL)
        return x_BCHW + _pointwise(self.out, gathered_BDL).view_as(x_BCHW)


def _pointwise(layer: nn.Conv2d, x_BCL: Tensor) -> Tensor:
    """A convolution of one cell as a product of matrices, which is faster on small maps."""
    weight_BDC = layer.weight.flatten(1).expand(len(x_BCL), -1, -1)
    return torch.baddbmm(layer.bias[:, None], weight_BDC, x_BCL)


def _mean_norm(difference: Tensor) -> Tensor:
    """The mean over images of the L2 norm, with a gradient of 0 where there is no difference."""
    return torch.linalg.vector_norm(difference.flatten(1), dim=1).mean()


def _norm_of_batch(difference: Tensor) -> Tensor:
    """The L2 norm of the images of all ranks together, with a gradient of 0 where there is no difference.

    Each rank's value is its part of it, of which the mean across ranks is the norm; so are the gradients.
    """
    own = difference.square().sum()
    mean = mean_across_ranks(own.detach())
    ranks = comm.get_world_size()
    norm = (mean * ranks).clamp(min=SQUARE_EPS).sqrt()
    part = ranks * own / norm
    return (part + part.detach()) / 2


NORMS_OF_IMAGES = {"image": _mean_norm, "batch": _norm_of_batch}
"""By the key NORM: from the difference of two maps (B, ...) to its norm."""
