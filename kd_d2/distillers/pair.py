"""The two detectors of a distillation, and training settings that methods depend on."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import CfgNode

from ..adapters import DetectorSpec
from .matching import common_strides


@dataclass(frozen=True)
class Pair:
    """The detectors and training settings that a method is built for.

    Attributes:
        student, teacher: the two detectors.
        datasets: names of the training datasets whose annotations are read; empty if pseudo-labels replace them.
        max_iter: number of training iterations.
    """

    student: DetectorSpec
    teacher: DetectorSpec
    datasets: tuple[str, ...] = ()
    max_iter: int = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> Pair:
        datasets = () if cfg.MODEL.KD.PSEUDO_LABELS.ENABLED else tuple(cfg.DATASETS.TRAIN)
        return cls(student, teacher, datasets, cfg.SOLVER.MAX_ITER)

    @property
    def strides(self) -> list[int]:
        """Strides of the neck levels that both detectors have, ascending. Raises a UserError if there are none."""
        return common_strides(self.student, self.teacher)

    @property
    def channels(self) -> dict[int, tuple[int, int]]:
        """Student and teacher channels at each of these strides."""
        shapes = self.student.shapes, self.teacher.shapes
        return {stride: tuple(of_detector[stride].channels for of_detector in shapes) for stride in self.strides}
