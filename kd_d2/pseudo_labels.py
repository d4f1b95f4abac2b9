"""Sources of a batch's ground truth: the annotations or the teacher's detections."""

from __future__ import annotations

from detectron2.structures import BitMasks, Boxes, Instances

from .adapters import DetectorOutputs, DetectorSpec
from .errors import UserError


class Annotations:
    """Ground truth from the dataset's annotations."""

    needs: frozenset[str] = frozenset()

    def check(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Raise a UserError if this ground truth does not suit the student and teacher."""

    def __call__(self, batched_inputs: list[dict], teacher: DetectorOutputs | None) -> list[Instances]:
        """Return the ground truth of each image, in pixels of the input.

        Args:
            teacher: the teacher's outputs for the batch, with the parts named in `needs`.
        """
        return [x["instances"] for x in batched_inputs]


class PseudoLabels(Annotations):
    """Ground truth from the teacher's detections (de Rijk 2022, table 11); annotations are ignored.

    Args:
        score_threshold: score above which detections are used.
    """

    needs = frozenset({"detections"})

    def __init__(self, score_threshold: float):
        self.score_threshold = score_threshold

    def check(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        if "detections" not in teacher.provides:
            raise UserError(
                f"MODEL.KD.PSEUDO_LABELS needs detections, which the teacher ({teacher.name}) does not have."
            )
        self.check_threshold(teacher)
        if "keypoints" in student.provides:
            raise UserError(
                f"MODEL.KD.PSEUDO_LABELS provides boxes and masks only, but the student ({student.name}) is also trained on keypoints."
            )
        if "masks" in student.provides - teacher.provides:
            raise UserError(
                f"MODEL.KD.PSEUDO_LABELS: the student ({student.name}) is trained on masks, which the teacher ({teacher.name}) "
                "does not predict."
            )

    def check_threshold(self, teacher: DetectorSpec) -> None:
        """Raise a UserError if the teacher's own score threshold discards detections that would be used."""
        lowest = teacher.score_threshold
        if lowest is not None and lowest > self.score_threshold:
            raise UserError(
                f"Pseudo-labels need teacher detections down to score {self.score_threshold} (MODEL.KD.PSEUDO_LABELS.SCORE_THRESH), but the "
                f"teacher ({teacher.name}) has none below {lowest}; lower its SCORE_THRESH_TEST in MODEL.KD.TEACHER.OPTS."
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
