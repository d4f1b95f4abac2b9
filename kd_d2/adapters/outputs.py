"""What a detector adapter reads from a detector in one forward pass.

Shape suffixes: B images, A anchors per position, K classes, C channels, H W map, R anchors of an image over
all levels, N proposals of all images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from ..modeling.assignment import Positives


@dataclass
class DensePredictions:
    """Predictions of a dense head, every dictionary keyed by stride, in ascending order.

    Attributes:
        logits: class logits (B, HWA, K).
        box_regression: box regression as the head gives it (B, HWA, D); D is 4, or more where sides are distributions.
        anchors: the anchors of a level, or its points as boxes of no area, HWA of them.
        quality: centerness or joint-score logits (B, HWA, 1), or None where the detector has none.
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
        """Class probabilities (B, HWA, K) by stride, in float32 as all that is made of the head's outputs here."""
        return {stride: logits.float().sigmoid() for stride, logits in self.logits.items()}

    @cached_property
    def ranking_scores(self) -> dict[int, Tensor]:
        """The scores (B, HWA, K) by which the detector ranks its boxes: sqrt(class * quality) where it has a quality."""
        if self.quality is None:
            return self.probabilities
        return {
            stride: (probability * self.quality[stride].float().sigmoid()).sqrt()
            for stride, probability in self.probabilities.items()
        }

    @cached_property
    def boxes(self) -> dict[int, Tensor]:
        """Decoded boxes (B, HWA, 4) in pixels of the network's input, by stride."""
        regression, anchors = torch.cat([*self.box_regression.values()], 1), Boxes.cat([*self.anchors.values()])
        return self._by_level(self.decode(regression, anchors))

    @cached_property
    def assignment(self) -> Tensor:
        """For every anchor, levels in order of stride, the index of its ground-truth box: (B, R) int64.

        `BACKGROUND` (-1) where it has none, `IGNORED` (-2) where the detector's own loss ignores it.
        """
        if self.assign is None:
            raise RuntimeError("the label assignment was asked of a forward pass that had no targets")
        return self.assign()

    @property
    def assignment_by_level(self) -> dict[int, Tensor]:
        """The label assignment (B, HWA) of each level, by stride."""
        return self._by_level(self.assignment)

    @cached_property
    def positives(self) -> Positives:
        """The anchors that have an instance, of the label assignment."""
        return Positives.of(self.assignment)

    def boxes_at(self, positives: Positives) -> Tensor:
        """Decoded boxes (P, 4) of the positives alone, in pixels of the network's input."""
        anchors = Boxes.cat(list(self.anchors.values()))
        return self.decode(positives.pick(self.box_regression.values()), anchors[positives.anchor])

    def _by_level(self, values: Tensor) -> dict[int, Tensor]:
        """Views of (B, R, ...) by stride, (B, HWA, ...)."""
        sizes = [logits.shape[1] for logits in self.logits.values()]
        return dict(zip(self.logits, values.split(sizes, 1), strict=True))


@dataclass
class SampledProposals:
    """The proposals that an R-CNN's box head is trained on, image after image, and how it classifies them.

    Of a cascade: those of its first stage, which alone reads the proposals themselves.

    Attributes:
        boxes: by image, in pixels of the network's input.
        logits: class logits (N, K + 1), background last.
        labels: (N,) int64 classes, K for background.
    """

    boxes: list[Boxes]
    logits: Tensor
    labels: Tensor


@dataclass
class Towers:
    """A dense head of two towers of convolutions, cut behind one of these.

    Attributes:
        class_features, box_features: by stride what goes into the activation behind the cut, (B, C, H, W); at a cut before the
            first convolution the neck's outputs, without one.
        finish: the same, class and box, of this or another detector -> dense predictions of the rest of this one's head. Gradients
            flow through it where they are enabled.
    """

    class_features: dict[int, Tensor]
    box_features: dict[int, Tensor]
    finish: Callable[[dict[int, Tensor], dict[int, Tensor]], DensePredictions] = field(repr=False)


def towers_at(split: int) -> str:
    """The name of the part that is a dense head's `Towers`, cut behind the convolution `split`, or with 0 before the first."""
    return f"towers/{split}"


@dataclass
class DetectorOutputs:
    """One forward pass of a detector, as far as it was asked for.

    Attributes:
        images: the normalized and padded input.
        features: neck outputs (B, C, H, W) keyed by stride.
        losses: the detector's own losses; empty where no targets were given.
        anchors: by stride, of a dense head or of an R-CNN's RPN; None where there are none or nobody asked.
        dense: predictions of a dense head; None where there is none or nobody asked.
        detections: per image the final detections in pixels of the image without its padding, masks of its size; None where
            nobody asked.
        proposals: those that the box head was trained on in this pass; None where there is none or nobody asked.
        classify: boxes of each image -> class logits (N, K + 1) of an R-CNN's box head, without gradient; None as above.
        towers: of a dense head, by where it is cut; only the cuts that were asked for.
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
    _classified: tuple[SampledProposals, Tensor] | None = field(default=None, init=False, repr=False)

    def logits_at(self, proposals: SampledProposals) -> Tensor:
        """Class logits (N, K + 1) of the box head at another detector's proposals, without gradient; asked again, it is not run again."""
        if self._classified is None or self._classified[0] is not proposals:
            self._classified = proposals, self.classify(proposals.boxes)
        return self._classified[1]

    def logit_map(self, stride: int) -> Tensor:
        """Class logits of a level of the dense head at its positions, (B, A * K, H, W) in float32."""
        shape = self.features[stride].shape[-2:]
        return self.dense.logits[stride].float().unflatten(1, (*shape, -1)).flatten(3).permute(0, 3, 1, 2)

    def probability_map(self, stride: int) -> Tensor:
        """Class probabilities, as `logit_map`."""
        return self.logit_map(stride).sigmoid()


@dataclass(frozen=True)
class DetectorSpec:
    """What is known of a detector before its first forward pass.

    Attributes:
        name: the meta-architecture's class name, for messages.
        family: "one-stage", "two-stage" or "other".
        shapes: channels and stride of each neck output, keyed by stride.
        num_classes: foreground classes, None where the detector does not tell.
        cell_anchors: by stride the anchors (A, 4) of the first position, in pixels; None where there are none.
        provides: which of "features", "anchors", "dense", "detections", "targets" its adapter can read; "quality" where its
            dense predictions have one; "distributions" where the box regression is logits of distributions; "points" where its
            anchors are points; "towers" and every `towers_at` where its head can be cut; "proposals" where a box head classifies
            them by softmax; "masks" and "keypoints" where it is trained on them and its detections have them.
        score_threshold: what its detections score at least, None where the detector does not tell.
        num_bins: of the distribution of a box's side, None where there are none.
        tower_channels: of a dense head's features before its first convolution and behind each; None where it has no towers.
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
