"""Correspondence between student and teacher: feature levels by stride, predictions by anchor."""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import Tensor

from ..adapters import DetectorSpec
from ..errors import UserError

PARTS_IN_WORDS = {
    "dense": "dense predictions",
    "distributions": "distributions of box sides",
    "losses": "detection losses for given features",
    "objectness": "the objectness of an RPN",
    "proposals": "a box head that classifies proposals by softmax (in standard ROI heads)",
    "towers": "a dense head with two convolutional towers",
}
"""Descriptions of the outputs that distillers need, for messages in which the name is not clear."""


def in_words(parts: Set[str]) -> str:
    """Return a description of outputs that distillers need."""
    return " and ".join(PARTS_IN_WORDS.get(part, part) for part in sorted(parts))


def without_adapter(spec: DetectorSpec) -> str:
    """Return the end of a message about what a detector does not have: that it has no adapter, if so."""
    if spec.has_adapter:
        return ""
    return ": it has no adapter of its own (docs/guides/own-detector.md), and BackboneAdapter reads only its backbone"


def common_strides(student: DetectorSpec, teacher: DetectorSpec) -> list[int]:
    """Return the strides that both detectors' necks have, ascending. Raises a UserError if there are none."""
    strides = sorted(student.shapes.keys() & teacher.shapes.keys())
    if not strides:
        raise UserError(
            f"The student ({student.name}, strides {sorted(student.shapes)}) and the teacher ({teacher.name}, strides "
            f"{sorted(teacher.shapes)}) have no feature level of the same stride."
        )
    return strides


def common_channels(spec: DetectorSpec, strides: list[int], reason: str) -> int:
    """Return the channels of all these levels. Raises a UserError that begins with `reason` if they differ."""
    channels = {stride: spec.shapes[stride].channels for stride in strides}
    if len({*channels.values()}) > 1:
        raise UserError(f"{reason}, but those of {spec.name} have different channels: {channels}.")
    return channels[strides[0]]


def check_same_classes(users: str, student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Raise a UserError that names the users of class predictions if the detectors have different numbers of classes."""
    if None not in (student.num_classes, teacher.num_classes) and student.num_classes != teacher.num_classes:
        raise UserError(
            f"The student ({student.name}) has {student.num_classes} classes and the teacher ({teacher.name}) {teacher.num_classes}; "
            f"they must be the same for {users}. Methods that compare only features allow different classes."
        )


def check_same_anchors(method: str, student: DetectorSpec, teacher: DetectorSpec, part: str = "dense") -> None:
    """Raise a UserError unless both detectors predict at the same anchors or points on the same levels.

    Args:
        method: name of the method, for the message.
        part: "dense", or "objectness" for the anchors of RPNs.
    """
    for whose, spec in (("student", student), ("teacher", teacher)):
        if part not in spec.provides:
            raise UserError(
                f"The distiller {method} needs {in_words({part})}, which the {whose} ({spec.name}) does not have{without_adapter(spec)}."
            )

    def anchors_of(spec: DetectorSpec) -> dict[int, list[list[float]]]:
        return {stride: anchors.tolist() for stride, anchors in sorted((spec.cell_anchors or {}).items())}

    ours, theirs = anchors_of(student), anchors_of(teacher)
    if ours.keys() != theirs.keys():
        raise UserError(
            f"{method} compares predictions anchor by anchor, but the student ({student.name}) predicts at the strides "
            f"{list(ours)} and the teacher ({teacher.name}) at {list(theirs)}."
        )
    for stride, anchors in ours.items():
        if anchors != theirs[stride]:
            raise UserError(
                f"{method} compares predictions anchor by anchor, but at stride {stride} the student ({student.name}) has "
                f"{_describe(anchors)} and the teacher ({teacher.name}) {_describe(theirs[stride])}."
            )


def check_anchors_at(method: str, whose: str, spec: DetectorSpec, strides: list[int]) -> None:
    """Raise a UserError if a method reads anchors on levels where a detector has none; `whose` is "student" or "teacher"."""
    without = [] if spec.cell_anchors is None else sorted({*strides} - spec.cell_anchors.keys())
    if without:
        raise UserError(
            f"{method} reads the {whose}'s anchors on every level that is compared, but {spec.name} has none at the strides "
            f"{without}: add them to the IN_FEATURES of its anchors."
        )


def _describe(anchors: list[list[float]]) -> str:
    x1, y1, x2, y2 = anchors[0]
    sides = f"{x2 - x1:.4g}x{y2 - y1:.4g} pixels around ({(x1 + x2) / 2:.4g}, {(y1 + y2) / 2:.4g})"
    return f"{len(anchors)} anchors per position, the first {sides}" if len(anchors) > 1 else f"one anchor of {sides}"


def levels_by_stride(features: dict[int, Tensor], strides: Iterable[int], whose: str) -> list[Tensor]:
    """Return the feature maps of the given strides. Raises a RuntimeError if one was not captured."""
    missing = [s for s in strides if s not in features]
    if missing:
        raise RuntimeError(
            f"the {whose}'s features at strides {missing} were not captured; captured strides: {sorted(features)}"
        )
    return [features[s] for s in strides]
