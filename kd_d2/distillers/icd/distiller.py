"""ICD: distillation of values where a decoder finds the evidence of each instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...adapters import DetectorOutputs
from ...distributed import mean_count_across_ranks
from ...errors import UserError
from ...keys import Above, AtLeast
from ...losses import attended_value_loss
from ...weight_selection import evenly_spaced
from ..adaptation import ChannelSelection, chosen_adaptation
from ..base import DISTILLER_REGISTRY, Distiller, Losses, OptimizerSettings, ParamGroup, in_float32
from ..matching import common_channels, levels_by_stride
from ..pair import Pair
from .decoder import Decoder, DecoderLayer
from .encoding import InstanceEncoder, linear, mlp
from .geometry import LevelGeometry
from .priors import read_priors
from .projection import project_levels
from .queries import FakeInstances, InstanceQueries, ObservedFakeInstances, build_queries

SMALLEST_SIZE = 1e-5
"""Minimum width and height of a box, as fractions of the image, to which smaller ones are clamped."""


@DISTILLER_REGISTRY.register()
class ICD(Distiller):
    """Instance-conditional distillation (Kang et al. 2021).

    The iterations of `detach_student_iters` begin at `config.start_iter`, which is to equal the start of its schedule.
    """

    needs = frozenset({"features", "targets"})
    loss_names = ("loss_icd", "loss_icd_aux_objectness", "loss_icd_aux_box")
    aux_loss_names = loss_names[1:]
    CONFIG_NODE = "ICD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Annotated[
            float | None,
            AtLeast(0),
            "Weight of the distillation loss (lambda); None means 8 for one-stage students and 3 for others.",
        ] = None
        adaptation: Annotated[
            Literal[None, "none", "select"],
            "Values with which the student's are compared: 'none' those of all channels of the teacher's features, 'select' those of as many "
            "evenly spaced channels as the student has, which weight selection inherits; None means 'select' if the student has fewer "
            "channels and inherits the neck (MODEL.KD.INHERIT), and else 'none'.",
        ] = None
        dim: Annotated[int, AtLeast(1), "Width of queries, keys and values; a multiple of 4 and of NUM_HEADS."] = 256
        num_heads: Annotated[int, AtLeast(1), "Attention heads of the decoder."] = 8
        num_layers: Annotated[int, AtLeast(1), "Layers of the decoder; their distillation losses are averaged."] = 1
        ffn_dim: Annotated[int, AtLeast(1), "Inner width of the decoder's feed-forward blocks."] = 1024
        jitter: Annotated[
            float,
            AtLeast(0),
            "The encoded center of an instance is shifted by U(-JITTER, JITTER) times its width and height (a).",
        ] = 0.3
        fakes_per_instance: Annotated[
            float, AtLeast(0), "Fake instances per real instance; an image without instances gets one."
        ] = 5.0
        max_queries: Annotated[int, AtLeast(1), "Maximum number of queries per image, real and fake."] = 300
        detach_student_iters: Annotated[
            int | None,
            AtLeast(0),
            "Iterations, starting at START_ITER, in which the distillation loss trains its value projection but not the student; None "
            "means SOLVER.MAX_ITER / 90, at most 1000, the paper's value for 90,000 iterations.",
        ] = None
        objectness_weight: Annotated[float, AtLeast(0), "Weight of the auxiliary task's identification loss."] = 1.0
        box_weight: Annotated[float, AtLeast(0), "Weight of the auxiliary task's localization loss."] = 1.0
        lr: Annotated[
            float,
            Above(0),
            "Learning rate of AdamW for all of ICD's own parameters, after warm-up and before cosine decay.",
        ] = 1e-4
        weight_decay: Annotated[float, AtLeast(0), "Weight decay of AdamW for ICD's own parameters."] = 1e-4
        lr_warmup_iters: Annotated[
            int,
            AtLeast(0),
            "Iterations of linear warm-up of this learning rate (WARMUP_ITERS applies to the distillation loss).",
        ] = 10
        clip_norm: Annotated[float, Above(0), "Maximum gradient norm over all parameters of ICD together."] = 0.01

        def check(self, name: str) -> None:
            for divisor, what in ((4, "4"), (self.num_heads, f"NUM_HEADS ({self.num_heads})")):
                if self.dim % divisor:
                    raise UserError(f"{name}.DIM is {self.dim}; it must be a multiple of {what}.")

    def __init__(self, config: Config, pair: Pair):
        student, teacher = pair.student, pair.teacher
        super().__init__(config, pair, default_weight=8.0 if student.family == "one-stage" else 3.0)
        self.strides = pair.strides
        num_classes = student.num_classes or teacher.num_classes
        if num_classes is None:
            raise UserError(
                f"ICD encodes each instance's class, but neither the student ({student.name}) nor the teacher "
                f"({teacher.name}) specifies how many classes it has."
            )
        teacher_channels, student_channels = (
            common_channels(spec, self.strides, "ICD reads all levels with one decoder") for spec in (teacher, student)
        )
        self.encoder = InstanceEncoder(num_classes, config.dim)
        self.decoder = Decoder(teacher_channels, config.dim, config.num_heads, config.ffn_dim, config.num_layers)
        self.auxiliary_head = mlp(config.dim, config.dim, 5)
        self.selection = None
        if chosen_adaptation(config.adaptation, pair, self.CONFIG_NODE) == "select":
            self.selection = ChannelSelection(evenly_spaced(student_channels, teacher_channels))
        self.student_values = nn.ModuleList(
            _starting_as(*self._compared_projection(layer), student_channels) for layer in self.decoder.layers
        )
        if pair.datasets:
            self.fakes = FakeInstances(*read_priors(pair.datasets, num_classes))
        else:
            self.fakes = ObservedFakeInstances(num_classes)
        self.query_options = {
            "fakes_per_instance": config.fakes_per_instance,
            "max_queries": config.max_queries,
            "jitter": config.jitter,
        }
        detached = config.detach_student_iters
        if detached is None:
            if not pair.max_iter:
                raise UserError(
                    "ICD needs the number of training iterations, as in `Pair(student, teacher, max_iter=90000)`, or "
                    "`ICD.Config(detach_student_iters=...)`."
                )
            detached = min(1000, pair.max_iter // 90)
        self.detach_student_until = config.start_iter + detached

    def param_groups(self, cfg: CfgNode) -> list[ParamGroup]:
        own = self.config
        optimizer = OptimizerSettings("icd", own.lr, own.weight_decay, own.lr_warmup_iters, own.clip_norm)
        return [ParamGroup(list(self.parameters()), optimizer)]

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
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
    ) -> Losses:
        """Compute the three losses from encoded queries (B, Q, E) and maps (B, C, H, W) per level."""
        found = self.decoder(query_BQE, queries.is_real[:, : queries.most_real], teacher_maps, geometry)
        distances = []
        for layer, projection, attended in zip(self.decoder.layers, self.student_values, found, strict=True):
            student_value = layer.heads(project_levels(student_maps, projection.weight, projection.bias))
            teacher_value = attended.values if self.selection is None else self._selected_values(layer, teacher_maps)
            distances.append(
                attended_value_loss(student_value, teacher_value, attended.attention, overwrite_student=True)
            )
        objectness, box = auxiliary_losses(self.auxiliary_head(found[-1].instances), queries)
        return {
            "loss_icd": sum(distances) / len(distances),
            "loss_icd_aux_objectness": self.config.objectness_weight * objectness,
            "loss_icd_aux_box": self.config.box_weight * box,
        }

    def _compared_projection(self, layer: DecoderLayer) -> tuple[Tensor, Tensor]:
        """Return weight (E, C) and bias of the map from the compared channels of the teacher's features to values."""
        weight_EC, bias_E = self.decoder.value_projection(layer)
        return (weight_EC if self.selection is None else weight_EC[:, self.selection.channels]), bias_E

    @torch.no_grad()
    def _selected_values(self, layer: DecoderLayer, teacher_maps: list[Tensor]) -> Tensor:
        """Return the values (B, M, L, D) of the selected channels of the teacher's features."""
        maps = [self.selection(m) for m in teacher_maps]
        return layer.heads(project_levels(maps, *self._compared_projection(layer)))

    @torch.no_grad()
    def attention_maps(self, teacher: DetectorOutputs, targets: list[Instances]) -> list[dict[int, Tensor]]:
        """Compute the decoder's attention for each instance, averaged over heads and layers.

        Returns:
            per image, by stride, the attention (N, H, W) of its instances in their order; it sums to 1 over all levels.
        """
        options = {**self.query_options, "fakes_per_instance": 0, "jitter": 0, "max_queries": max(map(len, targets))}
        queries = build_queries(targets, teacher.images.image_sizes, self.fakes, **options)
        maps = levels_by_stride(teacher.features, self.strides, "teacher")
        geometry = LevelGeometry.of(maps, teacher.images.image_sizes, teacher.images.tensor.shape[-2:])
        logits = self.decoder.attention_logits(self.encoder(queries), maps, geometry)
        attention_BQL = sum(layer.softmax(-1).mean(1) for layer in logits) / len(logits)
        levels = zip(attention_BQL.split([h * w for h, w in geometry.shapes], -1), geometry.shapes, strict=True)
        maps_BQHW = [level.unflatten(-1, shape) for level, shape in levels]
        of_images = ([x[image, : len(target)] for x in maps_BQHW] for image, target in enumerate(targets))
        return [dict(zip(self.strides, attention, strict=True)) for attention in of_images]


def _starting_as(teacher_weight: Tensor, teacher_bias: Tensor, student_channels: int) -> nn.Linear:
    """Build the student's value projection, a copy of the teacher's if the widths agree.

    Equal features then have zero distance from the first iteration. That matters with inheritance, where the student
    starts in the teacher's feature space, and in short trainings, whose warm-up is too short to align two random
    projections.
    """
    projection = linear(student_channels, len(teacher_weight))
    if projection.weight.shape == teacher_weight.shape:
        projection.load_state_dict({"weight": teacher_weight.detach(), "bias": teacher_bias.detach()})
    return projection


@in_float32
def auxiliary_losses(prediction_BQ5: Tensor, queries: InstanceQueries) -> tuple[Tensor, Tensor]:
    """Compute identification and localization losses: is the instance real, and where are the sides of its box?

    Args:
        prediction_BQ5: objectness logit, then the logits of the distances (left, top, right, bottom) from the jittered
            center to the sides, as fractions of the image.

    Returns:
        binary cross-entropy, averaged over all queries except padding; L1 relative to the box size, at least
        `SMALLEST_SIZE`, summed over sides and averaged over real queries.
    """
    is_real, is_query = queries.is_real.float(), (~queries.is_padding).float()
    objectness = F.binary_cross_entropy_with_logits(prediction_BQ5[..., 0], is_real, is_query, reduction="sum")
    centers, sizes = queries.boxes[..., :2], queries.boxes[..., 2:]
    offset = queries.centers - centers
    distances = torch.cat([sizes / 2 + offset, sizes / 2 - offset], -1)
    scale = torch.where(queries.is_real[..., None], 1 / sizes.clamp(min=SMALLEST_SIZE).repeat(1, 1, 2), 0.0)
    box = ((prediction_BQ5[..., 1:].sigmoid() - distances).abs() * scale).sum()
    return objectness / mean_count_across_ranks(is_query.sum()), box / mean_count_across_ranks(is_real.sum())
