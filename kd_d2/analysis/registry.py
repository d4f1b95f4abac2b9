"""The registry of analyses; it does not import PyTorch."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from .base import Analysis


class Entry(NamedTuple):
    """A registered analysis.

    Attributes:
        help: one line for `kd-d2 analyze --help`.
        target: the class, or "module:class" in this package, which is imported on first use.
    """

    help: str
    target: str | type[Analysis]


ANALYSES: dict[str, Entry] = {
    "errors": Entry("error types by class and object size, as precision-recall curves", "errors:ErrorAnalysis"),
    "detections": Entry("objects that one model detects and another misses", "detections:DetectionAnalysis"),
    "thresholds": Entry("precision, recall and F1 over the score threshold", "thresholds:ThresholdAnalysis"),
    "robustness": Entry("AP on corrupted images: 15 corruptions, 5 severities", "robustness:RobustnessAnalysis"),
    "features": Entry("feature maps: correlation of neighbors, distance to the teacher", "features:FeatureAnalysis"),
    "gradients": Entry("gradient norm and direction of each distillation loss", "gradients:GradientAnalysis"),
    "loss-maps": Entry("where in the image a distillation loss is large", "loss_maps:LossMapAnalysis"),
    "ranks": Entry("how student and teacher rank the candidates of each object", "ranks:RankAnalysis"),
    "rank-oracle": Entry("AP of a student with the teacher's ranks or scores", "rank_oracle:RankOracleAnalysis"),
    "attention": Entry("attention of ICD's decoder over the feature levels", "attention:AttentionAnalysis"),
}
"""Analyses by name: those of this package and those added by `register_analysis`."""


def register_analysis(cls: type[Analysis]) -> type[Analysis]:
    """Register an `Analysis` under its `name` for `kd-d2 analyze` and `kd-d2 report`; a class decorator.

    Raises:
        UserError: the name is already taken.
    """
    if cls.name in ANALYSES:
        raise UserError(
            f"An analysis named {cls.name!r} is already registered; choose another name for {cls.__name__}."
        )
    ANALYSES[cls.name] = Entry((inspect.getdoc(cls) or "").partition("\n")[0], cls)
    return cls


def find_analysis(name: str) -> type[Analysis]:
    """Return the class of a registered analysis.

    Raises:
        UserError: no analysis has this name.
    """
    if name not in ANALYSES:
        raise UserError(
            f"Unknown analysis {name!r}; available: {', '.join(ANALYSES)}. Use --import to register others."
        )
    target = ANALYSES[name].target
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), attribute)
    return target
