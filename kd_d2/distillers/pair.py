"""The two detectors of a distillation, and training settings that methods depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from detectron2.config import CfgNode

from ..adapters import DetectorSpec
from ..keys import AtLeast
from .matching import common_strides

NumLevels = Annotated[
    int | None,
    AtLeast(1),
    "Number of levels to compare, from the finest; None means all that both detectors have.",
]
"""Type of the key NUM_LEVELS of a method."""


@dataclass(frozen=True)
class Pair:
    """The detectors and training settings that a method is built for.

    Attributes:
        student, teacher: the two detectors.
        datasets: names of the training datasets whose annotations are read; empty if pseudo-labels replace them.
        max_iter: number of training iterations; 0 if unknown.
        num_levels: number of levels that the method compares, from the finest; None for all.
        inherits_neck: whether the student's neck inherits the teacher's, of which it gets evenly spaced channels if it has fewer.
    """

    student: DetectorSpec
    teacher: DetectorSpec
    datasets: tuple[str, ...] = ()
    max_iter: int = 0
    num_levels: int | None = None
    inherits_neck: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> Pair:
        datasets = () if cfg.MODEL.KD.PSEUDO_LABELS.ENABLED else tuple(cfg.DATASETS.TRAIN)
        keys = cfg.MODEL.KD.INHERIT
        inherits_neck = keys.ENABLED and keys.WEIGHT_SELECTION and "neck" in keys.MODULES
        return cls(student, teacher, datasets, cfg.SOLVER.MAX_ITER, inherits_neck=inherits_neck)

    def with_levels(self, number: int | None) -> Pair:
        """Return the same pair with the finest `number` of its common levels; None for all."""
        return replace(self, num_levels=number)

    @property
    def strides(self) -> list[int]:
        """Strides of the neck levels to compare, ascending. Raises a UserError if the detectors have none in common."""
        return common_strides(self.student, self.teacher)[: self.num_levels]

    @property
    def channels(self) -> dict[int, tuple[int, int]]:
        """Student and teacher channels at each of these strides."""
        shapes = self.student.shapes, self.teacher.shapes
        return {stride: tuple(of_detector[stride].channels for of_detector in shapes) for stride in self.strides}
