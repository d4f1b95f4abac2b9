"""Label assignment of anchors, and selection of predictions at the positives.

A label assignment is (B, R) int64: for each anchor, concatenated over levels, the index of its ground-truth box in the
image, `BACKGROUND` or `IGNORED`. Shape suffixes: B images, R anchors of an image over all levels, N boxes of an image,
C candidates of a box, P positives of all images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ..transfer import on_device

BACKGROUND = -1
IGNORED = -2
NARROW = 4
"""Number of channels up to which levels are concatenated, which needs fewer operators than picking from each."""


@dataclass
class Positives:
    """The positive anchors of a batch, ordered by image and anchor.

    Attributes:
        image: (P,) int64, index of the image.
        anchor: (P,) int64, index of the anchor over all levels of the image.
        instance: (P,) int64, index of the ground-truth instance in the image.
    """

    image: Tensor
    anchor: Tensor
    instance: Tensor
    _sizes: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _indices: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, assignment_BR: Tensor) -> Positives:
        """Return the positives of a label assignment."""
        image, anchor = (assignment_BR >= 0).nonzero(as_tuple=True)
        return cls(image, anchor, assignment_BR[image, anchor])

    def among_all(self, targets: list[Instances]) -> Tensor:
        """Return the indices (P,) of the instances in the concatenation of all images' instances."""
        starts = list(accumulate(map(len, targets), initial=0))[:-1]
        return on_device(starts, self.image.device)[self.image] + self.instance

    def ground_truth(self, targets: list[Instances]) -> tuple[Tensor, Tensor]:
        """Return the classes (P,) and boxes (P, 4) of the instances."""
        instance_P = self.among_all(targets)
        classes = torch.cat([target.gt_classes for target in targets])
        boxes = torch.cat([target.gt_boxes.tensor for target in targets])
        return classes[instance_P], boxes[instance_P]

    def pick(self, levels: Iterable[Tensor], channel_P: Tensor | None = None) -> Tensor:
        """Gather the values of levels, (B, HWA, X) each, at the positives. Wide levels are not concatenated.

        Returns:
            (P, X), or (P,) if `channel_P` selects one of the X channels for each positive.
        """
        levels = list(levels)
        if channel_P is None and levels[0].shape[2] <= NARROW:
            return torch.cat(levels, 1)[self.image, self.anchor]
        picked = None
        for level, (position_P, is_later_P) in zip(levels, self._in_levels([x.shape[1] for x in levels]), strict=True):
            here = level[self.image, position_P] if channel_P is None else level[self.image, position_P, channel_P]
            is_later = is_later_P.view(-1, *[1] * (here.dim() - 1))
            picked = here if picked is None else torch.where(is_later, here, picked)
        return picked

    def _in_levels(self, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return, for levels of these sizes, indices (P,) in each level, and whether a positive is in it or a later one."""
        if sizes != self._sizes:
            starts = list(accumulate(sizes, initial=0))[:-1]
            self._sizes = sizes
            self._indices = [
                ((self.anchor - start).clamp(0, size - 1), self.anchor >= start)
                for start, size in zip(starts, sizes, strict=True)
            ]
        return self._indices


@torch.no_grad()
def assign_by_iou(overlap_NR: Tensor, matcher: Matcher, *, touching: bool = False) -> Tensor:
    """RetinaNet's label assignment with the ground-truth index, which Detectron2's `label_anchors` drops.

    Args:
        overlap_NR: IoU of the N ground-truth boxes with the R anchors over all levels.
        matcher: labels 0 (background), -1 (ignored), 1 (foreground). It is not called, which would synchronize the GPU.
        touching: whether the best anchors of a box must overlap it. In Detectron2 all are the best of a box that none overlaps.

    Returns:
        (R,) int64: index of the box, `BACKGROUND` or `IGNORED`.
    """
    if len(overlap_NR) == 0:
        return torch.full(overlap_NR.shape[1:], BACKGROUND, device=overlap_NR.device)
    best_R, index_R = overlap_NR.max(0)
    assignment_R = index_R
    for label, low, high in zip(matcher.labels, matcher.thresholds, matcher.thresholds[1:]):
        if label != 1:
            is_between_R = (best_R >= low) & (best_R < high)
            assignment_R = assignment_R.masked_fill(is_between_R, BACKGROUND if label == 0 else IGNORED)
    if matcher.allow_low_quality_matches:
        is_best_NR = overlap_NR == overlap_NR.amax(1, keepdim=True)
        if touching:
            is_best_NR &= overlap_NR > 0
        assignment_R = torch.where(is_best_NR.any(0), index_R, assignment_R)
    return assignment_R


@torch.no_grad()
def assign_adaptively(anchors: list[Boxes], gt_boxes: Boxes, topk: int = 9) -> Tensor:
    """Adaptive training sample selection (Zhang et al. 2020, algorithm 1).

    The candidates of an instance are, on each level, the `topk` anchors whose centers are nearest to that of the
    instance. A candidate is positive if its IoU is at least the mean plus the standard deviation of all candidates, and
    its center is inside the instance. If it is positive for several instances, it takes the one with the highest IoU.

    Args:
        anchors: anchors of each level.
        gt_boxes: N boxes.

    Returns:
        (R,) int64, with R anchors over all levels: index of the box, or `BACKGROUND`.
    """
    everywhere = Boxes.cat(anchors)
    if len(gt_boxes) == 0:
        return torch.full((len(everywhere),), BACKGROUND, device=everywhere.device)
    overlap_NR, candidates_NC, threshold_N1 = adaptive_thresholds(anchors, gt_boxes, topk)
    candidate_overlap_NC = overlap_NR.gather(1, candidates_NC)
    x, y = everywhere.get_centers()[candidates_NC].unbind(-1)
    x1, y1, x2, y2 = gt_boxes.tensor[:, :, None].unbind(1)
    is_inside_NC = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    is_positive_NC = (candidate_overlap_NC >= threshold_N1) & is_inside_NC
    positive_overlap_NR = torch.full_like(overlap_NR, -1.0)
    positive_overlap_NR.scatter_(1, candidates_NC, candidate_overlap_NC.masked_fill(~is_positive_NC, -1.0))
    best_R, index_R = positive_overlap_NR.max(0)
    return index_R.masked_fill(best_R < 0, BACKGROUND)


@torch.no_grad()
def adaptive_thresholds(anchors: list[Boxes], gt_boxes: Boxes, topk: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Select the candidates of each instance and compute their IoU threshold, see `assign_adaptively`.

    Returns:
        IoUs with all anchors (N, R), indices of the candidates (N, C), and thresholds (N, 1): the mean plus the
        standard deviation of the candidates' IoUs.
    """
    everywhere = Boxes.cat(anchors)
    overlap_NR = pairwise_iou(gt_boxes, everywhere)
    centers_R2 = everywhere.get_centers()
    distance_NR = torch.cdist(gt_boxes.get_centers(), centers_R2, compute_mode="donot_use_mm_for_euclid_dist")
    start, candidates = 0, []
    for level in anchors:
        nearest = distance_NR[:, start : start + len(level)].topk(min(topk, len(level)), largest=False).indices
        candidates.append(start + nearest)
        start += len(level)
    candidates_NC = torch.cat(candidates, 1)
    overlap_NC = overlap_NR.gather(1, candidates_NC)
    correction = min(1, candidates_NC.shape[1] - 1)  # the deviation of a single candidate is undefined
    threshold_N1 = overlap_NC.mean(1, keepdim=True) + overlap_NC.std(1, correction=correction, keepdim=True)
    return overlap_NR, candidates_NC, threshold_N1
