"""A detector as a traceable function of one image tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor, nn
from torchvision.ops import boxes as ops

from ..adapters import build_adapter
from ..errors import UserError

GRID_COLUMNS = 32  # a power of two, by which division is exact


class DetectionGraph(nn.Module):
    """Image uint8 [3, H, W] in the detector's channel order -> `outputs`.

    Detections are those of Detectron2 for an image whose output size is its input size, except for masks, which are the
    head's probabilities [N, M, M] inside the boxes.

    Attributes:
        outputs: names of the outputs.
    """

    outputs: tuple[str, ...]

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()
        has_masks = getattr(getattr(model, "roi_heads", None), "mask_on", False)
        self.outputs = ("boxes", "scores", "classes", *(("masks",) if has_masks else ()))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        # Detectron2 takes len() of tensors, which the patch records in the trace.
        with torch.no_grad(), patch_builtin_len(), _nms_without_branch():
            found = self._detect(image)
        masks = (found.pred_masks[:, 0],) if "masks" in self.outputs else ()
        return (found.pred_boxes.tensor, found.scores, found.pred_classes, *masks)

    def _detect(self, image: Tensor) -> Instances:
        if not isinstance(self.model, GeneralizedRCNN):
            return self.model([{"image": image}])[0]["instances"]
        found = self.model.inference([{"image": image}], do_postprocess=False)[0]  # keeps the masks of the head
        return found[found.pred_boxes.nonempty()]


@contextlib.contextmanager
def _nms_without_branch() -> Iterator[None]:
    """Trace torchvision's batched_nms without its branch for no boxes, in which OpenVINO would create a box."""
    original = ops.batched_nms
    ops.batched_nms = batched_nms
    try:
        yield
    finally:
        ops.batched_nms = original


def batched_nms(boxes_N4: Tensor, scores_N: Tensor, classes_N: Tensor, iou_threshold: float) -> Tensor:
    """Apply NMS to each class: the boxes are moved so that those of different classes do not overlap.

    As in torchvision, but to cells of a grid instead of a line, so that the coordinates of a thousand classes remain precise.
    """
    with_zero = torch.cat([boxes_N4, boxes_N4.new_zeros(1, 4)])  # there may be no box
    side = with_zero.max() - with_zero.min() + 1
    class_N = classes_N.to(boxes_N4)
    row_N = (class_N / GRID_COLUMNS).floor()
    cell_N2 = torch.stack([class_N - GRID_COLUMNS * row_N, row_N], dim=1)
    return ops.nms(boxes_N4 + side * cell_N2.repeat(1, 2), scores_N, iou_threshold)


class CandidateGraph(nn.Module):
    """Image uint8 [3, H, W] -> boxes [R, 4] of all anchors, their scores [R, classes], and their levels [R] from 0.

    There is no sorting, threshold or NMS, hence no shape depends on the image content.

    Raises:
        UserError: the detector has no dense predictions that kd_d2 can read.
    """

    outputs = ("boxes", "scores", "levels")

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()
        self.adapter = build_adapter(model)
        if "dense" not in self.adapter.provides:
            raise UserError(
                f"--no-nms: {type(model).__name__} needs NMS internally; omit the option, or use a one-stage detector."
            )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            dense = self.adapter.run([{"image": image}], frozenset({"dense"})).dense
            scores = [level[0] for level in dense.ranking_scores.values()]
            boxes = [level[0] for level in dense.boxes.values()]
            levels = [torch.full_like(level[:, 0], number, dtype=torch.int64) for number, level in enumerate(scores)]
        return torch.cat(boxes), torch.cat(scores), torch.cat(levels)


def check_detector(model: nn.Module) -> None:
    """Raise a UserError if the model has outputs other than boxes and masks, which would be lost."""
    if getattr(getattr(model, "roi_heads", None), "keypoint_on", False):
        raise UserError("MODEL.KEYPOINT_ON is True: keypoints cannot be exported; boxes and masks can.")
    if hasattr(model, "sem_seg_head"):
        raise UserError(f"{type(model).__name__} has a semantic segmentation head, which cannot be exported.")
