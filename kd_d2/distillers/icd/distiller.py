"""ICD: the student's values follow the teacher's where a decoder finds the evidence of each instance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...adapters import DetectorOutputs, DetectorSpec
from ...distributed import mean_count_across_ranks
from ...errors import UserError
from ...losses import attended_value_loss
from ..base import (
    DISTILLER_REGISTRY,
    Distiller,
    OptimizerSettings,
    ParamGroup,
    check_number,
    in_float32,
)
from ..matching import common_strides, levels_by_stride
from .decoder import Decoder
from .encoding import InstanceEncoder, linear, mlp
from .geometry import LevelGeometry
from .priors import read_priors
from .projection import project_levels
from .queries import FakeInstances, InstanceQueries, ObservedFakeInstances, build_queries


@DISTILLER_REGISTRY.register()
class ICD(Distiller):
    """Instance-conditional distillation (Kang et al. 2021)."""

    needs = frozenset({"features", "targets"})
    loss_names = ("loss_icd", "loss_icd_aux_objectness", "loss_icd_aux_box")
    CONFIG_NODE = "ICD"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # lambda of the paper; None: 8 for one-stage detectors, 3 for the others.
        node.WEIGHT = None
        # Width of queries, keys and values; a multiple of 4 and of NUM_HEADS.
        node.DIM = 256
        # Attention heads of the decoder.
        node.NUM_HEADS = 8
        # Layers of the decoder; the distillation losses of all of them are averaged.
        node.NUM_LAYERS = 1
        # Inner width of the decoder's feed-forward blocks.
        node.FFN_DIM = 1024
        # a: the encoded centre of an instance is moved by U(-a, a) of its width and height.
        node.JITTER = 0.3
        # Fake instances per real one; an image without instances gets one.
        node.FAKES_PER_INSTANCE = 5.0
        # Queries of an image, real and fake together.
        node.MAX_QUERIES = 300
        # Iterations, from START_ITER on, in which the distillation loss trains its value projection but not the student; None: a
        # 90th of SOLVER.MAX_ITER and at most 1000, the paper's number of 90,000.
        node.DETACH_STUDENT_ITERS = None
        # Weights of the auxiliary task's losses, which train the decoder.
        node.OBJECTNESS_WEIGHT = 1.0
        node.BOX_WEIGHT = 1.0
        # AdamW for everything of ICD's own: learning rate after the warm-up, before the cosine.
        node.LR = 1e-4
        node.WEIGHT_DECAY = 1e-4
        # Iterations of its learning rate's linear warm-up (WARMUP_ITERS is the distillation loss's).
        node.LR_WARMUP_ITERS = 10
        # Limit of the gradient norm over all parameters of ICD together.
        node.CLIP_NORM = 0.01

    @classmethod
    def weight_default(cls, node: CfgNode, student: DetectorSpec) -> float:
        return 8.0 if student.family == "one-stage" else 3.0

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        for key in ("DIM", "NUM_HEADS", "NUM_LAYERS", "FFN_DIM", "MAX_QUERIES"):
            check_number(cls.CONFIG_NODE, key, node[key], 1)
        for key in (
            "JITTER",
            "FAKES_PER_INSTANCE",
            "OBJECTNESS_WEIGHT",
            "BOX_WEIGHT",
            "WEIGHT_DECAY",
            "LR_WARMUP_ITERS",
        ):
            check_number(cls.CONFIG_NODE, key, node[key], 0)
        if node.DETACH_STUDENT_ITERS is not None:
            check_number(cls.CONFIG_NODE, "DETACH_STUDENT_ITERS", node.DETACH_STUDENT_ITERS, 0)
        for key in ("LR", "CLIP_NORM"):
            check_number(cls.CONFIG_NODE, key, node[key], 0, exclusive=True)
        for divisor, name in ((4, "4"), (node.NUM_HEADS, f"NUM_HEADS ({node.NUM_HEADS})")):
            if node.DIM % divisor:
                raise UserError(f"MODEL.KD.ICD.DIM is {node.DIM}; it must be a multiple of {name}.")

    @configurable
    def __init__(
        self,
        *,
        weight: float,
        strides: list[int],
        encoder: InstanceEncoder,
        decoder: Decoder,
        student_channels: int,
        fakes: FakeInstances,
        jitter: float = 0.3,
        fakes_per_instance: float = 5.0,
        max_queries: int = 300,
        detach_student_until: int = 0,
        objectness_weight: float = 1.0,
        box_weight: float = 1.0,
        optimizer: OptimizerSettings | None = None,
    ):
        """
        Args:
            weight: lambda.
            strides: the levels.
            encoder, decoder: of one dim.
            student_channels: of the student's features.
            fakes: draws fake instances.
            jitter, fakes_per_instance, max_queries: see `build_queries`.
            detach_student_until: the first iteration whose distillation loss trains the student.
            objectness_weight, box_weight: of the auxiliary losses.
            optimizer: of all parameters of ICD; None for the student's.
        """
        super().__init__()
        self.weight = weight
        self.strides = strides
        self.encoder = encoder
        self.decoder = decoder
        self.auxiliary_head = mlp(decoder.dim, decoder.dim, 5)
        self.student_values = nn.ModuleList(
            _starting_as(*decoder.value_projection(layer), student_channels) for layer in decoder.layers
        )
        self.fakes = fakes
        self.query_options = {
            "fakes_per_instance": fakes_per_instance,
            "max_queries": max_queries,
            "jitter": jitter,
        }
        self.detach_student_until = detach_student_until
        self.objectness_weight = objectness_weight
        self.box_weight = box_weight
        self.optimizer = optimizer

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.ICD
        strides = common_strides(student, teacher)
        num_classes = student.num_classes or teacher.num_classes
        if num_classes is None:
            raise UserError(
                f"ICD encodes each instance's class, but neither the student ({student.name}) nor the teacher "
                f"({teacher.name}) tells how many classes it has."
            )
        detached = node.DETACH_STUDENT_ITERS
        if detached is None:
            detached = min(1000, cfg.SOLVER.MAX_ITER // 90)
        return {
            "weight": cls.weight_of(node, student),
            "strides": strides,
            "encoder": InstanceEncoder(num_classes, node.DIM),
            "decoder": Decoder(_channels(teacher, strides), node.DIM, node.NUM_HEADS, node.FFN_DIM, node.NUM_LAYERS),
            "student_channels": _channels(student, strides),
            "fakes": _fakes(cfg, num_classes),
            "jitter": node.JITTER,
            "fakes_per_instance": node.FAKES_PER_INSTANCE,
            "max_queries": node.MAX_QUERIES,
            "detach_student_until": node.START_ITER + detached,
            "objectness_weight": node.OBJECTNESS_WEIGHT,
            "box_weight": node.BOX_WEIGHT,
            "optimizer": OptimizerSettings("icd", node.LR, node.WEIGHT_DECAY, node.LR_WARMUP_ITERS, node.CLIP_NORM),
        }

    def param_groups(self, cfg: CfgNode) -> list[ParamGroup]:
        return [ParamGroup(list(self.parameters()), self.optimizer)]

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        self.fakes.observe(targets, student.images.image_sizes)
        queries = build_queries(targets, student.images.image_sizes, self.fakes, **self.query_options)
        student_maps = levels_by_stride(student.features, self.strides, "student")
        if get_event_storage().iter < self.detach_student_until:
            student_maps = [m.detach() for m in student_maps]
        teacher_maps = levels_by_stride(teacher.features, self.strides, "teacher")
        geometry = LevelGeometry.of(teacher_maps, student.images.image_sizes, student.images.tensor.shape[-2:])
        return self.losses(self.encoder(queries), queries, student_maps, teacher_maps, geometry)

    def losses(
        self,
        query_BQE: Tensor,
        queries: InstanceQueries,
        student_maps: list[Tensor],
        teacher_maps: list[Tensor],
        geometry: LevelGeometry,
    ) -> dict[str, Tensor]:
        """The three losses of encoded queries (B, Q, E); maps (B, C, H, W) per level."""
        found = self.decoder(query_BQE, queries.is_real[:, : queries.most_real], teacher_maps, geometry)
        distances = []
        for layer, projection, attended in zip(self.decoder.layers, self.student_values, found, strict=True):
            student_value = layer.heads(project_levels(student_maps, projection.weight, projection.bias))
            distances.append(
                attended_value_loss(student_value, attended.values, attended.attention, overwrite_student=True)
            )
        objectness, box = auxiliary_losses(self.auxiliary_head(found[-1].instances), queries)
        return {
            "loss_icd": self.weight * sum(distances) / len(distances),
            "loss_icd_aux_objectness": self.objectness_weight * objectness,
            "loss_icd_aux_box": self.box_weight * box,
        }

    @torch.no_grad()
    def attention_maps(self, teacher: DetectorOutputs, targets: list[Instances]) -> list[dict[int, Tensor]]:
        """Where the decoder looks for each instance, averaged over heads and layers.

        Returns:
            per image by stride the attention (N, H, W) of its instances, in their order; over all levels it sums to 1.
        """
        options = {**self.query_options, "fakes_per_instance": 0, "jitter": 0, "max_queries": max(map(len, targets))}
        queries = build_queries(targets, teacher.images.image_sizes, self.fakes, **options)
        maps = levels_by_stride(teacher.features, self.strides, "teacher")
        geometry = LevelGeometry.of(maps, teacher.images.image_sizes, teacher.images.tensor.shape[-2:])
        logits = self.decoder.attention_logits(self.encoder(queries), maps, geometry)
        attention_BQL = sum(layer.softmax(-1).mean(1) for layer in logits) / len(logits)
        levels = attention_BQL.split([h * w for h, w in geometry.shapes], -1)
        return [
            {
                stride: level[image, : len(target)].unflatten(-1, shape)
                for stride, level, shape in zip(self.strides, levels, geometry.shapes, strict=True)
            }
            for image, target in enumerate(targets)
        ]


def _fakes(cfg: CfgNode, num_classes: int) -> FakeInstances:
    if cfg.MODEL.KD.PSEUDO_LABELS.ENABLED:
        return ObservedFakeInstances(num_classes)
    return FakeInstances(*read_priors(cfg.DATASETS.TRAIN, num_classes))


def _starting_as(teacher_weight: Tensor, teacher_bias: Tensor, student_channels: int) -> nn.Linear:
    """The student's value projection; a copy of the teacher's where the widths agree.

    Then equal features have no distance from the first iteration on. That matters with inheritance, where the student starts in the
    teacher's space, and in short trainings, whose warm-up is too short to bring two random projections together.
    """
    projection = linear(student_channels, len(teacher_weight))
    if projection.weight.shape == teacher_weight.shape:
        projection.load_state_dict({"weight": teacher_weight.detach(), "bias": teacher_bias.detach()})
    return projection


def _channels(spec: DetectorSpec, strides: list[int]) -> int:
    channels = {spec.shapes[s].channels for s in strides}
    if len(channels) > 1:
        raise UserError(
            f"ICD reads all levels with one decoder, but those of {spec.name} have different channels: "
            f"{ {s: spec.shapes[s].channels for s in strides} }."
        )
    return channels.pop()


@in_float32
def auxiliary_losses(prediction_BQ5: Tensor, queries: InstanceQueries) -> tuple[Tensor, Tensor]:
    """Identification and localisation: is the instance real, and where are the sides of its box?

    Args:
        prediction_BQ5: objectness logit, then the logits of the distances (left, top, right, bottom) from the jittered
            centre to the sides, in parts of the image.

    Returns:
        binary cross-entropy, mean over all queries but padding; L1 in parts of the box's own size, summed over the
        sides, mean over real queries.
    """
    is_real, is_query = queries.is_real.float(), (~queries.is_padding).float()
    objectness = F.binary_cross_entropy_with_logits(prediction_BQ5[..., 0], is_real, is_query, reduction="sum")
    centers, sizes = queries.boxes[..., :2], queries.boxes[..., 2:]
    offset = queries.centers - centers
    distances = torch.cat([sizes / 2 + offset, sizes / 2 - offset], -1)
    scale = torch.where(queries.is_real[..., None], 1 / sizes.repeat(1, 1, 2), 0.0)
    box = ((prediction_BQ5[..., 1:].sigmoid() - distances).abs() * scale).sum()
    return objectness / mean_count_across_ranks(is_query.sum()), box / mean_count_across_ranks(is_real.sum())
