"""Decoding of the outputs of a file without NMS into detections, as in Detectron2's dense detectors."""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from torch import Tensor

from .metadata import ExportMetadata


def decode(
    boxes_R4: Tensor, scores_RK: Tensor, levels_R: Tensor, info: ExportMetadata
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes [N, 4], scores [N] and classes [N], the best first.

    1. Select the `topk_candidates` best pairs of anchor and class per level with a score above `score_threshold`.
    2. Apply NMS per class with the IoU threshold `nms_threshold`.
    3. Select the `max_detections` best.

    Args:
        boxes_R4, scores_RK, levels_R: outputs of the file for R anchors.
    """
    kept = []
    for level in range(int(levels_R.max()) + 1):
        pair_P2 = ((scores_RK > info.score_threshold) & (levels_R == level)[:, None]).nonzero()
        score_P = scores_RK[pair_P2[:, 0], pair_P2[:, 1]]
        kept.append(pair_P2[score_P.topk(min(len(score_P), info.topk_candidates)).indices])
    anchor_P, class_P = torch.cat(kept).unbind(1)
    box_P4, score_P = boxes_R4[anchor_P], scores_RK[anchor_P, class_P]
    keep = batched_nms(box_P4, score_P, class_P, info.nms_threshold)[: info.max_detections]
    return box_P4[keep], score_P[keep], class_P[keep]
