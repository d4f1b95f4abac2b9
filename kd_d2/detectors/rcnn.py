"""Adapter of the R-CNN family: Faster, Mask, Cascade R-CNN, and every GeneralizedRCNN that keeps its forward pass."""

from __future__ import annotations

from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .adapter import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter, first_anchors
from .outputs import DetectorOutputs


@DETECTOR_ADAPTER_REGISTRY.register()
class RCNNAdapter(DetectorAdapter):
    """Features of all neck levels, the RPN's anchors, and the losses of RPN and heads."""

    model_class = GeneralizedRCNN
    composes = ("forward", "preprocess_image")
    family = "two-stage"

    @property
    def provides(self) -> frozenset[str]:
        rpn = self.model.proposal_generator
        heads = self.model.roi_heads
        parts = {
            "anchors": hasattr(rpn, "anchor_generator"),
            "masks": getattr(heads, "mask_on", False),
            "keypoints": getattr(heads, "keypoint_on", False),
        }
        return frozenset({"features", "detections", "targets", *(part for part, is_there in parts.items() if is_there)})

    @property
    def num_classes(self) -> int | None:
        return getattr(self.model.roi_heads, "num_classes", None)

    @property
    def score_threshold(self) -> float | None:
        predictor = getattr(self.model.roi_heads, "box_predictor", None)
        if isinstance(predictor, nn.ModuleList):  # a cascade's, of which the last one's scores are cut
            predictor = predictor[-1]
        return getattr(predictor, "test_score_thresh", None)

    def _rpn_strides(self) -> list[int]:
        shapes = self.model.backbone.output_shape()
        return [shapes[name].stride for name in self.model.proposal_generator.in_features]

    def cell_anchors(self) -> dict[int, Tensor] | None:
        if "anchors" not in self.provides:
            return None
        return first_anchors(self.model.proposal_generator.anchor_generator, self._rpn_strides())

    def run(
        self, batched_inputs: list[dict], want: frozenset[str], targets: list[Instances] | None = None
    ) -> DetectorOutputs:
        model = self.model
        images = self.preprocess(batched_inputs)
        named = model.backbone(images.tensor)
        outputs = DetectorOutputs(images, self.by_stride(named))
        if "anchors" in want:
            rpn = model.proposal_generator
            maps = [named[name] for name in rpn.in_features]
            outputs.anchors = dict(zip(self._rpn_strides(), rpn.anchor_generator(maps), strict=True))
        if "detections" in want:
            proposals, _ = self._propose(batched_inputs, images, named, None)
            outputs.detections = self.in_input_pixels(model.roi_heads(images, named, proposals, None)[0], images)
        if targets is not None:
            proposals, proposal_losses = self._propose(batched_inputs, images, named, targets)
            _, head_losses = model.roi_heads(images, named, proposals, targets)
            if model.vis_period > 0 and get_event_storage().iter % model.vis_period == 0:
                model.visualize_training(batched_inputs, proposals)
            outputs.losses = {**head_losses, **proposal_losses}
        return outputs

    def _propose(
        self, batched_inputs: list[dict], images: ImageList, named: dict[str, Tensor], targets: list[Instances] | None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """The RPN's proposals and losses, or the proposals that the data bring."""
        if self.model.proposal_generator is None:
            return [x["proposals"].to(self.model.device) for x in batched_inputs], {}
        return self.model.proposal_generator(images, named, targets)
