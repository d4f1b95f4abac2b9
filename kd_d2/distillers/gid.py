"""GID: distillation of the instances on which student and teacher disagree most, annotated or not.

The number of instances per image varies. To avoid synchronizing the GPU, every image has a fixed number of slots, and
empty slots do not contribute. Shape suffixes: B images, K classes, R anchors of an image over all levels, C candidates
of an image, M slots of an image, S slots of all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Annotated

import torch
import torch.nn.functional as F
from detectron2.layers import batched_nms
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import roi_align

from ..adapters import DensePredictions, DetectorOutputs
from ..distributed import mean_count_across_ranks
from ..errors import UserError
from ..keys import Above, AtLeast, AtMost
from ..modeling.assignment import Positives
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .matching import check_same_anchors, common_channels
from .pair import Pair

FEATURE, RELATION, CLASS, BOX = (f"loss_gid_{part}" for part in ("feature", "relation", "class", "box"))
CANDIDATES = 1000  # per image, before NMS
FEWEST_RELATED = 3  # instances that an image needs for its relations to be informative


@dataclass
class GeneralInstances:
    """Selected instances of a batch, in order of image and descending score.

    Attributes:
        anchors: anchor of each slot, as `Positives` without ground truth.
        boxes: (S, 4) in input pixels, predicted by the detector with the higher score.
        is_taken: (S,) whether the slot contains an instance.
    """

    anchors: Positives
    boxes: Tensor
    is_taken: Tensor


@DISTILLER_REGISTRY.register()
class GID(Distiller):
    """General instance distillation (Dai et al. 2021): features, relations and responses of general instances.

    An anchor's score is the largest difference between the class probabilities of the two detectors; its box is that of
    the detector with the higher one. After NMS, the best INSTANCES of each image are kept, N in total. Times WEIGHT:

    - features: sum over instances of |RoIAlign(phi(F_S)) - RoIAlign(F_T)|^2 / (N * h * w), on the anchor's level;
    - relations: smooth L1 between the distances of an image's instances, each divided by their mean; mean over images;
    - responses: binary cross-entropy with the teacher's probabilities and L1 of the box regression, divided by N.

    Relations and responses are skipped if their weight is 0.
    """

    needs = frozenset({"features", "dense"})
    loss_names = (FEATURE, RELATION, CLASS, BOX)
    CONFIG_NODE = "GID"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        instances: Annotated[int, AtLeast(1), "Number of general instances per image."] = 10
        nms_thresh: Annotated[float, Above(0), AtMost(1), "IoU threshold of the NMS among candidates."] = 0.3
        resolution: Annotated[int, AtLeast(1), "RoIAlign output size of an instance."] = 10
        feature_weight: Annotated[float, AtLeast(0), "Weight of the feature loss."] = 5e-4
        relation_weight: Annotated[float, AtLeast(0), "Weight of the relation loss."] = 40.0
        class_weight: Annotated[float, AtLeast(0), "Weight of the class response loss."] = 0.1
        box_weight: Annotated[float, AtLeast(0), "Weight of the box response loss."] = 0.1
        adaptation: Adaptation = "1x1"

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        check_same_anchors("GID", pair.student, pair.teacher)
        common_channels(pair.teacher, pair.strides, "GID compares instances of all levels")
        weights = config.feature_weight, config.relation_weight, config.class_weight, config.box_weight
        self.weights = self.weigh_losses(*weights, optional=(RELATION, CLASS, BOX))
        if BOX in self.weights and pair.student.num_bins != pair.teacher.num_bins:
            raise UserError(
                f"GID compares box regression, which the student ({pair.student.name}) and the teacher ({pair.teacher.name}) encode "
                "differently: set MODEL.KD.GID.BOX_WEIGHT to 0."
            )
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        config = self.config
        selected = select_instances(student.dense, teacher.dense, config.instances, config.nms_thresh)
        count = mean_count_across_ranks(selected.is_taken.sum().float())
        students, teachers = self._features(student, teacher, selected)
        square = _sum_of((students - teachers).square(), selected.is_taken)
        losses = {FEATURE: square / (count * config.resolution**2)}
        if RELATION in self.weights:
            places = (x.unflatten(0, (-1, config.instances)) for x in (students, teachers, selected.is_taken))
            losses[RELATION] = relation_loss(*places)
        pick = selected.anchors.pick
        if CLASS in self.weights:
            ours, theirs = (pick(x.dense.logits.values()).float() for x in (student, teacher))
            entropy = F.binary_cross_entropy_with_logits(ours, theirs.sigmoid().detach(), reduction="none")
            losses[CLASS] = _sum_of(entropy, selected.is_taken) / count
        if BOX in self.weights:
            ours, theirs = (pick(x.dense.box_regression.values()).float() for x in (student, teacher))
            losses[BOX] = _sum_of((ours - theirs.detach()).abs(), selected.is_taken) / count
        return {name: weight * losses[name] for name, weight in self.weights.items()}

    def _features(
        self, student: DetectorOutputs, teacher: DetectorOutputs, selected: GeneralInstances
    ) -> tuple[Tensor, Tensor]:
        """Return features (S, C, h, w) of adapted student and teacher, each slot's from its anchor's level."""
        ends = accumulate(len(anchors) for anchors in student.dense.anchors.values())
        level_S = sum((selected.anchors.anchor >= end).long() for end in ends)
        order_S = level_S.argsort()
        sizes = torch.stack([(level_S == level).sum() for level in range(len(student.dense.anchors))])
        rois_S5 = torch.cat([selected.anchors.image[:, None].to(selected.boxes.dtype), selected.boxes], 1)
        pairs = dict(zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True))
        crop, parts = partial(roi_align, output_size=self.config.resolution, sampling_ratio=2, aligned=True), []
        for stride, here in zip(student.dense.anchors, order_S.split(sizes.tolist()), strict=True):
            parts.append([crop(x.float(), rois_S5[here], spatial_scale=1 / stride) for x in pairs[stride]])
        back_S = order_S.argsort()
        return tuple(torch.cat(of_detector)[back_S] for of_detector in zip(*parts, strict=True))


def _sum_of(values: Tensor, is_taken: Tensor) -> Tensor:
    """Return the sum of values (S, ...) over slots that contain an instance."""
    return values.flatten(1).sum(1).where(is_taken, 0).sum()


@torch.no_grad()
def select_instances(
    student: DensePredictions, teacher: DensePredictions, most: int, nms_threshold: float
) -> GeneralInstances:
    """Select the `most` instances per image on which the two detectors disagree most, after NMS over all classes."""
    differences, teacher_is_surer = [], []
    for ours, theirs in zip(student.logits.values(), teacher.logits.values(), strict=True):
        ours, theirs = ours.float().sigmoid(), theirs.float().sigmoid()
        differences.append((theirs - ours).abs().amax(2))
        teacher_is_surer.append(theirs.amax(2) > ours.amax(2))
    score_BC, anchor_BC = (x := torch.cat(differences, 1)).topk(min(CANDIDATES, x.shape[1]), dim=1)
    num_images = len(score_BC)
    number_B = torch.arange(num_images, device=score_BC.device)
    image_P = number_B[:, None].expand_as(anchor_BC).flatten()
    candidates = _anchors(image_P, anchor_BC.flatten())
    boxes_P4 = torch.where(
        torch.cat(teacher_is_surer, 1).gather(1, anchor_BC).view(-1, 1),
        teacher.boxes_at(candidates),
        student.boxes_at(candidates),
    )
    # torchvision moves the boxes of images apart by the largest coordinate, which assumes that none is negative.
    kept = batched_nms(boxes_P4 - boxes_P4.amin(), score_BC.flatten(), image_P, nms_threshold)  # best first
    rank = (image_P[kept, None] == number_B).cumsum(0).gather(1, image_P[kept, None])[:, 0] - 1
    # Instances without a slot share one after the last.
    place = torch.where(rank < most, image_P[kept] * most + rank, num_images * most)
    chosen_S = kept.new_zeros(num_images * most + 1).scatter_(0, place, kept)[:-1]
    is_taken_S = kept.new_zeros(num_images * most + 1, dtype=torch.bool).scatter_(0, place, True)[:-1]
    image_S = number_B.repeat_interleave(most, output_size=num_images * most)
    return GeneralInstances(_anchors(image_S, candidates.anchor[chosen_S]), boxes_P4[chosen_S], is_taken_S)


def _anchors(image: Tensor, anchor: Tensor) -> Positives:
    return Positives(image, anchor, torch.full_like(anchor, -1))


def relation_loss(student: Tensor, teacher: Tensor, is_taken_BM: Tensor) -> Tensor:
    """Compute the smooth L1 loss between distances of an image's instances, each divided by the image's mean distance.

    Averaged over pairs, then over images with at least three instances; 0 if there are none.

    Args:
        student, teacher: (B, M, ...) features of the instances.
        is_taken_BM: whether a slot contains an instance.
    """
    first, second = torch.triu_indices(*[is_taken_BM.shape[1]] * 2, offset=1, device=is_taken_BM.device)
    is_pair = is_taken_BM[:, first] & is_taken_BM[:, second]
    pairs_B = is_pair.sum(1).clamp(min=1)

    def normalized_distances(features: Tensor) -> Tensor:
        flat = features.flatten(2)
        distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")[:, first, second]
        mean_B = distances.where(is_pair, 0).sum(1) / pairs_B
        return distances / mean_B.clamp(min=1e-6)[:, None]

    losses = F.smooth_l1_loss(normalized_distances(student), normalized_distances(teacher), reduction="none")
    is_related_B = is_taken_BM.sum(1) >= FEWEST_RELATED
    total = (losses.where(is_pair, 0).sum(1) / pairs_B).where(is_related_B, 0).sum()
    return total / mean_count_across_ranks(is_related_B.sum().float())
