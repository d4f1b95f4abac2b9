"""Comparison of the detections of an exported file and its PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor

from ..errors import UserError

SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 1e-4
"""Fraction of an image's longer side."""
MASK_TOLERANCE = 1e-3
"""Fraction of the pixels."""


@dataclass
class Comparison:
    """Differences between the detections of two models, over all images so far.

    Attributes:
        images, detections: numbers of compared images and detections.
        box: maximum difference of a coordinate, in pixels.
        score: maximum difference of a score.
        unmatched: number of detections of either model without a counterpart.
    """

    images: int = 0
    detections: int = 0
    box: float = 0.0
    score: float = 0.0
    unmatched: int = 0

    def add(self, expected: Instances, found: Instances, threshold: float, limit: int | None) -> None:
        """Compare the detections in one image.

        A detection without a counterpart is ignored if its score is at the cutoff: the score threshold, or the lowest
        score if the limit of detections is reached.

        Args:
            threshold: the minimum score.
            limit: the maximum number of detections; None, or a negative number as in Detectron2, for no limit.
        """
        self.images += 1
        pairs = match(expected, found)
        for i, j in pairs:
            box = expected.pred_boxes.tensor[i] - found.pred_boxes.tensor[j]
            self.box = max(self.box, float(box.abs().max()))
            self.score = max(self.score, abs(float(expected.scores[i] - found.scores[j])))
        self.detections += len(pairs)
        for side, index in ((expected, 0), (found, 1)):
            lowest = threshold
            if len(side) and limit is not None and 0 <= limit <= len(side):
                lowest = float(side.scores.min())
            alone = set(range(len(side))) - {pair[index] for pair in pairs}
            self.unmatched += sum(abs(float(side.scores[i]) - lowest) > SCORE_TOLERANCE for i in alone)

    def __str__(self) -> str:
        return (
            f"{self.detections} detections in {self.images} images: boxes differ by at most {self.box:.1e} pixels, "
            f"scores by {self.score:.1e}"
        )


def match(expected: Instances, found: Instances) -> list[tuple[int, int]]:
    """Return pairs of detections that are equal within the tolerances; each is in at most one pair."""
    if not len(expected) or not len(found):
        return []
    side = max(expected.image_size)
    box_EF = (expected.pred_boxes.tensor[:, None] - found.pred_boxes.tensor).abs().amax(-1) / (side * BOX_TOLERANCE)
    score_EF = (expected.scores[:, None] - found.scores).abs() / SCORE_TOLERANCE
    distance_EF = torch.maximum(box_EF, score_EF)
    distance_EF[expected.pred_classes[:, None] != found.pred_classes] = torch.inf
    if expected.has("pred_masks"):
        for i, j in (distance_EF <= 1).nonzero().tolist():  # masks of all pairs would need gigabytes
            different = (expected.pred_masks[i] != found.pred_masks[j]).float().mean()
            distance_EF[i, j] = torch.maximum(distance_EF[i, j], different / MASK_TOLERANCE)
    pairs = []
    for i, row in enumerate(distance_EF):
        j = int(row.argmin())
        if row[j] <= 1:
            pairs.append((i, j))
            distance_EF[:, j] = torch.inf
    return pairs


Model = Callable[[list[dict]], list[dict[str, Instances]]]


def compare(model: Model, exported: Model, images: list[Tensor], threshold: float, limit: int | None) -> Comparison:
    """Compare the detections of both models in images [3, H, W] of their input format; see `Comparison.add`."""
    comparison = Comparison()
    for image in images:
        with torch.no_grad():
            expected, found = (m([{"image": image}])[0]["instances"] for m in (model, exported))
        comparison.add(expected, found, threshold, limit)
    return comparison


def require_equal(comparison: Comparison, what: str) -> None:
    """Raise a UserError if a detection of either model has no counterpart."""
    if comparison.unmatched:
        raise UserError(
            f"{what} was not written, since its detections differ from PyTorch's: {comparison.unmatched} have no counterpart "
            f"with a box within {BOX_TOLERANCE} of the image's longer side and a score within {SCORE_TOLERANCE} "
            f"({comparison})."
        )
