"""Where a batch's ground truth comes from: the annotations, or the teacher."""

from __future__ import annotations

from detectron2.structures import BitMasks, Boxes, Instances

from .adapters import DetectorOutputs, DetectorSpec
from .errors import UserError


class Annotations:
    """The ground truth that the data bring."""

    needs: frozenset[str] = frozenset()

    def check(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Raise a UserError where the pair cannot be trained in this way."""

    def __call__(self, batched_inputs: list[dict], teacher: DetectorOutputs | None) -> list[Instances]:
        """Ground truth per image, in pixels of the input.

        Args:
            teacher: its outputs for the batch, with the parts that `needs` names.
        """
        return [x["instances"] for x in batched_inputs]


class PseudoLabels(Annotations):
    """The teacher's detections above a score as ground truth (de Rijk 2022, table 11); annotations are not looked at.

    Args:
        score_threshold: detections with a higher score count.
    """

    needs = frozenset({"detections"})

    def __init__(self, score_threshold: float):
        self.score_threshold = score_threshold

    def check(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        self.check_threshold(teacher)
        if "keypoints" in student.provides:
            raise UserError(
                f"MODEL.KD.PSEUDO_LABELS gives boxes and masks, but the student ({student.name}) is also trained on keypoints."
            )
        if "masks" in student.provides - teacher.provides:
            raise UserError(
                f"MODEL.KD.PSEUDO_LABELS: the student ({student.name}) is trained on masks, which the teacher ({teacher.name}) "
                "does not predict."
            )

    def check_threshold(self, teacher: DetectorSpec) -> None:
        """Raise a UserError where the teacher itself leaves out detections that would count."""
        lowest = teacher.score_threshold
        if lowest is not None and lowest > self.score_threshold:
            raise UserError(
                f"Pseudo-labels need teacher detections down to score {self.score_threshold} (MODEL.KD.PSEUDO_LABELS.SCORE_THRESH), but the "
                f"teacher ({teacher.name}) has none below {lowest}; lower its SCORE_THRESH_TEST by MODEL.KD.TEACHER.OPTS."
            )

    def __call__(self, batched_inputs: list[dict], teacher: DetectorOutputs | None) -> list[Instances]:
        return [self._as_ground_truth(detections) for detections in teacher.detections]

    def _as_ground_truth(self, detections: Instances) -> Instances:
        detections = detections[detections.scores > self.score_threshold]
        boxes = Boxes(detections.pred_boxes.tensor.float())
        target = Instances(detections.image_size, gt_boxes=boxes, gt_classes=detections.pred_classes)
        if detections.has("pred_masks"):
            target.gt_masks = BitMasks(detections.pred_masks)
        return target
