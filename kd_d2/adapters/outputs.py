"""Outputs of a detector adapter in one forward pass.

Shapes: B images, A anchors per position, K classes, C channels, H and W of the feature map, R anchors of an image over
all levels, N proposals of all images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from ..modeling.assignment import Positives

Levels = dict[int, Tensor]
"""Maps or predictions by stride."""

Level = TypeVar("Level")


def _is_ascending(levels: dict[int, Level]) -> bool:
    return [*levels] == sorted(levels)


def _ascending(levels: dict[int, Level]) -> dict[int, Level]:
    return {stride: levels[stride] for stride in sorted(levels)}


@dataclass
class DensePredictions:
    """Predictions of a dense head. All dictionaries are keyed by stride in ascending order.

    Attributes:
        logits: class logits (B, HWA, K).
        box_regression: raw box regression of the head (B, HWA, D); D is 4, or larger if box sides are distributions.
        anchors: the HWA anchors of each level; points are anchors with a side of one stride.
        quality: centerness or joint-score logits (B, HWA, 1); None if the detector predicts none.
        decode: (box_regression (..., N, D), their N anchors) -> boxes in input pixels (..., N, 4).
        assign: () -> label assignment (B, R), see `assignment`.
    """

    logits: dict[int, Tensor]
    box_regression: dict[int, Tensor]
    anchors: dict[int, Boxes]
    decode: Callable[[Tensor, Boxes], Tensor] = field(repr=False)
    quality: dict[int, Tensor] | None = None
    assign: Callable[[], Tensor] | None = field(default=None, repr=False)

    @cached_property
    def probabilities(self) -> dict[int, Tensor]:
        """Class probabilities (B, HWA, K) by stride, in float32, as is everything derived from the head's outputs."""
        return {stride: logits.float().sigmoid() for stride, logits in self.logits.items()}

    @cached_property
    def ranking_scores(self) -> dict[int, Tensor]:
        """Scores (B, HWA, K) by which the detector ranks its boxes: sqrt(class * quality) if it predicts a quality."""
        if self.quality is None:
            return self.probabilities
        return {
            stride: (probability * self.quality[stride].float().sigmoid()).sqrt()
            for stride, probability in self.probabilities.items()
        }

    @cached_property
    def boxes(self) -> dict[int, Tensor]:
        """Decoded boxes (B, HWA, 4) in input pixels, by stride."""
        regression, anchors = torch.cat([*self.box_regression.values()], 1), Boxes.cat([*self.anchors.values()])
        return self._by_level(self.decode(regression, anchors))

    @cached_property
    def assignment(self) -> Tensor:
        """Index of the ground-truth box of each anchor, with levels in order of stride: (B, R) int64.

        It is `BACKGROUND` (-1) if there is none, and `IGNORED` (-2) if the detection loss ignores the anchor.
        """
        if self.assign is None:
            raise RuntimeError("label assignment requested from a forward pass without targets")
        return self.assign()

    @property
    def assignment_by_level(self) -> dict[int, Tensor]:
        """Label assignment (B, HWA) of each level, by stride."""
        return self._by_level(self.assignment)

    @cached_property
    def positives(self) -> Positives:
        """The positive anchors of the label assignment."""
        return Positives.of(self.assignment)

    def boxes_at(self, positives: Positives) -> Tensor:
        """Return the decoded boxes (P, 4) of the positives only, in input pixels."""
        anchors = Boxes.cat(list(self.anchors.values()))
        return self.decode(positives.pick(self.box_regression.values()), anchors[positives.anchor])

    def with_levels(self, change: Callable[[Levels], Levels]) -> DensePredictions:
        """Return a copy with changed outputs of the head, and the same label assignment."""
        changed = replace(
            self,
            logits=change(self.logits),
            box_regression=change(self.box_regression),
            quality=None if self.quality is None else change(self.quality),
            assign=lambda: self.assignment,
        )
        if "positives" in vars(self):  # computed where it costs no synchronization with the GPU
            changed.positives = self.positives
        return changed

    def ascending(self) -> DensePredictions:
        """Return the predictions, with their label assignment, in ascending order of stride."""
        if _is_ascending(self.logits):
            return self
        changed = replace(
            self,
            logits=_ascending(self.logits),
            box_regression=_ascending(self.box_regression),
            anchors=_ascending(self.anchors),
            quality=None if self.quality is None else _ascending(self.quality),
            assign=self.assign and (lambda: torch.cat([*_ascending(self.assignment_by_level).values()], 1)),
        )
        if "positives" in vars(self):  # where they cost little synchronization with the GPU
            changed.positives = Positives.of(changed.assignment)
        return changed

    def _by_level(self, values: Tensor) -> dict[int, Tensor]:
        """Views of (B, R, ...) by stride, (B, HWA, ...)."""
        sizes = [logits.shape[1] for logits in self.logits.values()]
        return dict(zip(self.logits, values.split(sizes, 1), strict=True))


@dataclass
class SampledProposals:
    """The proposals that an R-CNN's box head is trained on, concatenated over images, and their class logits.

    For a cascade, these are from the first stage, the only one that takes the proposals themselves.

    Attributes:
        boxes: boxes of each image, in input pixels.
        logits: class logits (N, K + 1), background last.
        labels: (N,) int64 classes, K for background.
    """

    boxes: list[Boxes]
    logits: Tensor
    labels: Tensor


@dataclass
class Towers:
    """A dense head with two towers of convolutions, split after one of the convolutions.

    Attributes:
        class_features, box_features: inputs (B, C, H, W) of the activation after the split, by stride; for a split
            before the first convolution, the neck outputs.
        finish: (class features, box features), of this or another detector -> dense predictions of the rest of this
            head. Gradients flow through it if enabled.
    """

    class_features: dict[int, Tensor]
    box_features: dict[int, Tensor]
    finish: Callable[[dict[int, Tensor], dict[int, Tensor]], DensePredictions] = field(repr=False)

    def with_levels(self, change: Callable[[Levels], Levels]) -> Towers:
        """Return a copy with changed features."""
        return replace(self, class_features=change(self.class_features), box_features=change(self.box_features))


def towers_at(split: int) -> str:
    """Return the name of the part for `Towers` split after convolution number `split`, or before the first one if 0."""
    return f"towers/{split}"


@dataclass
class DetectorOutputs:
    """The requested outputs of one forward pass of a detector. Parts that were not requested are None or empty.

    Dictionaries by stride are in ascending order.

    Attributes:
        images: the normalized and padded input.
        features: neck outputs (B, C, H, W) by stride.
        losses: detection losses; empty without targets.
        anchors: anchors of a dense head or of an R-CNN's RPN, by stride; None if there are none.
        dense: predictions of a dense head; None if there is none.
        detections: final detections of each image in pixels of the unpadded input image, with masks of its size.
        proposals: proposals that the box head was trained on in this forward pass; None if there are none.
        classify: boxes of each image -> class logits (N, K + 1) of an R-CNN's box head, without gradient; None if there
            is no box head.
        towers: towers of a dense head by split; only the requested splits.
        objectness: logits (B, HWA, 1) of an RPN by stride; None if there is no RPN.
        losses_of: (features by stride in place of `features`, ground truth) -> detection losses, without those of masks
            and keypoints; also of a detector in eval mode, which does not change. Gradients flow to the features if
            enabled.
    """

    images: ImageList
    features: dict[int, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)
    anchors: dict[int, Boxes] | None = None
    dense: DensePredictions | None = None
    detections: list[Instances] | None = None
    proposals: SampledProposals | None = None
    classify: Callable[[list[Boxes]], Tensor] | None = field(default=None, repr=False)
    towers: dict[int, Towers] = field(default_factory=dict)
    objectness: dict[int, Tensor] | None = None
    losses_of: Callable[[dict[int, Tensor], list[Instances]], dict[str, Tensor]] | None = field(
        default=None, repr=False
    )
    _classified: tuple[SampledProposals, Tensor] | None = field(default=None, init=False, repr=False)

    def with_levels(self, change: Callable[[Levels], Levels]) -> DetectorOutputs:
        """Return a copy with changed neck outputs, dense predictions, objectness and towers."""
        return replace(
            self,
            features=change(self.features),
            dense=None if self.dense is None else self.dense.with_levels(change),
            objectness=None if self.objectness is None else change(self.objectness),
            towers={split: towers.with_levels(change) for split, towers in self.towers.items()},
        )

    def ascending(self) -> DetectorOutputs:
        """Return the outputs with all levels in ascending order of stride."""
        if _is_ascending(self.features):
            return self
        return replace(
            self,
            features=_ascending(self.features),
            anchors=None if self.anchors is None else _ascending(self.anchors),
            dense=None if self.dense is None else self.dense.ascending(),
            objectness=None if self.objectness is None else _ascending(self.objectness),
            towers={split: towers.with_levels(_ascending) for split, towers in self.towers.items()},
        )

    def logits_at(self, proposals: SampledProposals) -> Tensor:
        """Return the box head's class logits (N, K + 1) at another detector's proposals, without gradient (cached)."""
        if self._classified is None or self._classified[0] is not proposals:
            self._classified = proposals, self.classify(proposals.boxes)
        return self._classified[1]

    def logit_map(self, stride: int) -> Tensor:
        """Return the class logits of one level of the dense head as a map, (B, A * K, H, W) in float32."""
        shape = self.features[stride].shape[-2:]
        return self.dense.logits[stride].float().unflatten(1, (*shape, -1)).flatten(3).permute(0, 3, 1, 2)

    def probability_map(self, stride: int) -> Tensor:
        """Return the class probabilities of one level, in the same form as `logit_map`."""
        return self.logit_map(stride).sigmoid()


PARTS = frozenset(
    {
        "anchors",
        "dense",
        "detections",
        "distributions",
        "features",
        "keypoints",
        "losses",
        "masks",
        "objectness",
        "points",
        "proposals",
        "quality",
        "targets",
        "towers",
    }
)
"""Names in `DetectorSpec.provides`, except those of `towers_at`, which begin with "towers/"."""
CLASSIFIED_PARTS = frozenset({"dense", "detections", "proposals"})
"""The PARTS that have predictions of classes."""


@dataclass(frozen=True)
class DetectorSpec:
    """Static properties of a detector, known before its first forward pass.

    Attributes:
        name: class name of the meta-architecture, for messages.
        family: "one-stage", "two-stage" or "other".
        shapes: channels and stride of each neck output, by stride.
        num_classes: number of foreground classes; None if unknown.
        cell_anchors: anchors (A, 4) of the first position by stride, in pixels; None if there are none.
        provides: which of "features", "anchors", "dense", "detections", "targets" its adapter can return; "quality" if
            its dense predictions include one; "distributions" if the box regression consists of distribution logits;
            "losses" if it can compute `losses_of`; "objectness" if its anchors are those of an RPN that scores them;
            "points" if its anchors are points; "towers" and each `towers_at` if its head can be split; "proposals" if a
            box head classifies them by softmax; "masks" and "keypoints" if it is trained on them and detects them.
        score_threshold: minimum score of its detections; None if unknown.
        num_bins: number of bins in the distribution of a box side; None if there are no distributions.
        tower_channels: channels of a dense head before its first convolution and after each; None without towers.
        has_adapter: whether the detector has an adapter of its own, rather than `BackboneAdapter`.
    """

    name: str
    family: str
    shapes: dict[int, ShapeSpec]
    num_classes: int | None
    cell_anchors: dict[int, torch.Tensor] | None
    provides: frozenset[str]
    score_threshold: float | None = None
    num_bins: int | None = None
    tower_channels: tuple[int, ...] | None = None
    has_adapter: bool = True
