"""GID: the instances on which student and teacher disagree most are distilled, annotated or not.

Shape suffixes: B images, K classes, R anchors of an image over all levels, S selected instances of all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import roi_align

from ..detectors import DensePredictions, DetectorOutputs, DetectorSpec
from ..errors import UserError
from ..modeling.assignment import Positives
from ..workers import mean_count_of_workers
from .base import (
    ADAPTATION_KERNELS,
    DISTILLER_REGISTRY,
    AdaptationLayers,
    Distiller,
    check_choice,
    check_number,
    check_same_anchors,
)

CANDIDATES = 1000  # of an image, before the NMS
FEWEST_RELATED = 3  # instances of an image whose distances tell something


@dataclass
class GeneralInstances:
    """The selected instances of a batch, those of an image one after the other.

    Attributes:
        anchors: the anchor of each, as `Positives` without a ground truth.
        boxes: (S, 4) in input pixels, as the detector with the higher score sees them.
    """

    anchors: Positives
    boxes: Tensor


@DISTILLER_REGISTRY.register()
class GID(Distiller):
    """General instance distillation (Dai et al. 2021): features, relations and responses of general instances.

    An anchor's score is the largest difference of the class probabilities of the two; its box is that of the detector with the
    higher one. After an NMS the best INSTANCES of each image remain. Times WEIGHT:

    - features: sum over instances of |RoIAlign(phi(F_S)) - RoIAlign(F_T)|^2 / (S * h * w), on the anchor's level;
    - relations: smooth l1 between the distances of an image's instances, each divided by their mean; mean over images;
    - responses: binary cross-entropy with the teacher's probabilities and l1 of the box regression, over S.
    """

    needs = frozenset({"features", "dense"})
    loss_names = ("loss_gid_feature", "loss_gid_relation", "loss_gid_class", "loss_gid_box")
    CONFIG_NODE = "GID"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Of an image.
        node.INSTANCES = 10
        node.NMS_THRESH = 0.3
        # Side of an instance's features.
        node.RESOLUTION = 10
        node.FEATURE_WEIGHT = 5e-4
        node.RELATION_WEIGHT = 40.0
        node.CLASS_WEIGHT = 0.1
        node.BOX_WEIGHT = 0.1
        # phi, between student and teacher features: "none", "1x1" or "3x3".
        node.ADAPTATION = "1x1"

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, ADAPTATION_KERNELS)
        for key in ("FEATURE_WEIGHT", "RELATION_WEIGHT", "CLASS_WEIGHT", "BOX_WEIGHT"):
            check_number(cls.CONFIG_NODE, key, node[key], 0)
        for key in ("INSTANCES", "RESOLUTION"):
            check_number(cls.CONFIG_NODE, key, node[key], 1)
        if not 0 < node.NMS_THRESH <= 1:
            raise UserError(f"MODEL.KD.GID.NMS_THRESH is {node.NMS_THRESH}; it must be above 0 and at most 1.")

    @configurable
    def __init__(
        self,
        *,
        adaptation: AdaptationLayers,
        instances: int = 10,
        nms_threshold: float = 0.3,
        resolution: int = 10,
        weights: tuple[float, float, float, float] = (5e-4, 40.0, 0.1, 0.1),
    ):
        """
        Args:
            adaptation: the layers phi; its strides are the levels.
            instances, nms_threshold, resolution: see the keys.
            weights: of the losses, in order of `loss_names`.
        """
        super().__init__()
        self.adaptation = adaptation
        self.instances = instances
        self.nms_threshold = nms_threshold
        self.resolution = resolution
        self.weights = weights

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.GID
        check_same_anchors(cls.__name__, student, teacher)
        of_losses = (node.FEATURE_WEIGHT, node.RELATION_WEIGHT, node.CLASS_WEIGHT, node.BOX_WEIGHT)
        return {
            "adaptation": AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher),
            "instances": node.INSTANCES,
            "nms_threshold": node.NMS_THRESH,
            "resolution": node.RESOLUTION,
            "weights": tuple(node.WEIGHT * weight for weight in of_losses),
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        selected = select_instances(student.dense, teacher.dense, self.instances, self.nms_threshold)
        count = mean_count_of_workers(selected.boxes.new_tensor(float(len(selected.boxes))))
        students, teachers = self._features(student, teacher, selected)
        feature = (students - teachers).square().sum() / (count * self.resolution**2)
        relation = relation_loss(students, teachers, selected.anchors.image, len(targets))
        classes, box = self._responses(student.dense, teacher.dense, selected.anchors)
        losses = (feature, relation, classes / count, box / count)
        return {n: w * loss for n, w, loss in zip(self.loss_names, self.weights, losses, strict=True)}

    def _features(
        self, student: DetectorOutputs, teacher: DetectorOutputs, selected: GeneralInstances
    ) -> tuple[Tensor, Tensor]:
        """(S, C, h, w) of the adapted student and the teacher, level after level, an image's instances in one order."""
        ends = accumulate(len(anchors) for anchors in student.dense.anchors.values())
        end_L = torch.tensor([*ends], device=selected.boxes.device)
        level_S = torch.bucketize(selected.anchors.anchor, end_L, right=True)
        rois_S5 = torch.cat([selected.anchors.image[:, None].to(selected.boxes.dtype), selected.boxes], 1)
        pairs = dict(zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True))
        parts, orders = [], []
        for level, stride in enumerate(student.dense.anchors):
            order = (level_S == level).nonzero()[:, 0]
            crop = partial(
                roi_align, output_size=self.resolution, spatial_scale=1 / stride, sampling_ratio=2, aligned=True
            )
            parts.append([crop(x.float(), rois_S5[order]) for x in pairs[stride]])
            orders.append(order)
        order_S = torch.cat(orders).argsort()
        return tuple(torch.cat(of_detector)[order_S] for of_detector in zip(*parts, strict=True))

    def _responses(
        self, student: DensePredictions, teacher: DensePredictions, anchors: Positives
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy and l1, summed over the instances."""
        logits, regression = (anchors.pick(x.values()).float() for x in (student.logits, student.box_regression))
        with torch.no_grad():
            probability = anchors.pick(teacher.logits.values()).float().sigmoid()
            theirs = anchors.pick(teacher.box_regression.values()).float()
        classes = F.binary_cross_entropy_with_logits(logits, probability, reduction="sum")
        return classes, F.l1_loss(regression, theirs, reduction="sum")


@torch.no_grad()
def select_instances(
    student: DensePredictions, teacher: DensePredictions, most: int, nms_threshold: float
) -> GeneralInstances:
    """The `most` instances of each image on which the two disagree most, after an NMS over all classes."""
    levels = zip(student.logits.values(), teacher.logits.values(), strict=True)
    differences = [(t.float().sigmoid() - s.float().sigmoid()).abs().max(2) for s, t in levels]
    score_BR, class_BR = (torch.cat(parts, 1) for parts in zip(*differences, strict=True))
    score_BC, anchor_BC = score_BR.topk(min(CANDIDATES, score_BR.shape[1]), dim=1)
    image_BC = torch.arange(len(score_BC), device=score_BC.device)[:, None].expand_as(anchor_BC)
    anchors = Positives(image_BC.flatten(), anchor_BC.flatten(), torch.full_like(anchor_BC, -1).flatten())
    class_P = class_BR[anchors.image, anchors.anchor]
    ours, theirs = (anchors.pick(x.logits.values(), class_P) for x in (student, teacher))
    is_teachers = (theirs > ours)[:, None]
    boxes = torch.where(is_teachers, teacher.boxes_at(anchors).float(), student.boxes_at(anchors).float())
    kept = batched_nms(boxes, score_BC.flatten(), anchors.image, nms_threshold)  # best first
    rank = F.one_hot(anchors.image[kept], len(score_BC)).cumsum(0).gather(1, anchors.image[kept][:, None])[:, 0]
    kept = kept[rank <= most]
    kept = kept[anchors.image[kept].argsort(stable=True)]
    return GeneralInstances(
        Positives(*(x[kept] for x in (anchors.image, anchors.anchor, anchors.instance))), boxes[kept]
    )


def relation_loss(student: Tensor, teacher: Tensor, image: Tensor, num_images: int) -> Tensor:
    """Smooth l1 between the distances of the instances of an image, each divided by the image's mean distance.

    The mean over pairs, then over the images with three instances or more; 0 where there is none.

    Args:
        student, teacher: (S, ...) features of the instances.
        image: (S,) the image of each, ascending.
    """
    losses = [student.sum() * 0.0]
    for number in range(num_images):
        ours, theirs = (x[image == number].flatten(1) for x in (student, teacher))
        if len(ours) >= FEWEST_RELATED:
            losses.append(F.smooth_l1_loss(_normalized_distances(ours), _normalized_distances(theirs)))
    count = mean_count_of_workers(student.new_tensor(float(len(losses) - 1)))
    return sum(losses) / count


def _normalized_distances(features: Tensor) -> Tensor:
    """(pairs,) distances of different instances, divided by their mean."""
    distances = F.pdist(features)
    return distances / distances.mean().clamp(min=1e-6)
