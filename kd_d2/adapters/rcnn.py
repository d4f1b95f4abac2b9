"""Adapter for Faster, Mask and Cascade R-CNN, and any GeneralizedRCNN that does not override the forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .adapter import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter, reorder_outputs, unscaled
from .anchors import first_anchors, grid_anchors
from .other_features import box_losses_of
from .outputs import DetectorOutputs, SampledProposals

TRAINING_PASS = ("forward", "_forward_box", "label_and_sample_proposals")
"""Methods of Detectron2's box heads that the adapter relies on; proposals of heads that override them are not read."""


@DETECTOR_ADAPTER_REGISTRY.register()
class RCNNAdapter(DetectorAdapter):
    """R-CNNs: features of all neck levels, RPN anchors, proposals of the box head, and losses of the RPN and heads."""

    model_class = GeneralizedRCNN
    composes = ("forward", "preprocess_image")
    family = "two-stage"

    @property
    def provides(self) -> frozenset[str]:
        parts = {"features", "losses", "targets", *self.parts_of_instances}
        if not isinstance(self.model.proposal_generator, RRPN):  # whose boxes are rotated
            parts.add("detections")
        if hasattr(self.model.proposal_generator, "anchor_generator"):
            strides = self._rpn_strides()
            if len({*strides}) == len(strides):
                parts.add("anchors")
                if type(self.model.proposal_generator).forward is RPN.forward:
                    parts.add("objectness")
        if _classifies_by_softmax(self.model.roi_heads):
            parts.add("proposals")
        return frozenset(parts)

    @property
    def score_threshold(self) -> float | None:
        last = box_predictors(self.model.roi_heads)[-1]  # for a cascade, the one whose scores are thresholded
        return getattr(last, "test_score_thresh", None)

    def reorder_classes(self, order: list[int]) -> None:
        heads = self.model.roi_heads
        predictors = box_predictors(heads)
        masks = heads.mask_head if getattr(heads, "mask_on", False) else None
        known = type(heads) in (StandardROIHeads, CascadeROIHeads, Res5ROIHeads)
        known = known and all(type(predictor) is FastRCNNOutputLayers for predictor in predictors)
        if not known or type(masks) not in (type(None), MaskRCNNConvUpsampleHead):
            super().reorder_classes(order)
        for predictor in predictors:
            reorder_outputs(predictor.cls_score, order)  # the background is last
            box_dim = len(predictor.box2box_transform.weights)
            if predictor.bbox_pred.out_features > box_dim:  # otherwise class-agnostic
                reorder_outputs(predictor.bbox_pred, order, width=box_dim)
        if masks is not None and masks.predictor.out_channels > 1:
            reorder_outputs(masks.predictor, order)

    def _rpn_strides(self) -> list[int]:
        shapes = self.model.backbone.output_shape()
        return [shapes[name].stride for name in self.model.proposal_generator.in_features]

    def _rpn_maps(self, named: dict[str, Tensor]) -> list[Tensor]:
        return [named[name] for name in self.model.proposal_generator.in_features]

    def _objectness(self, maps: list[Tensor]) -> dict[int, Tensor]:
        """Return the objectness logits (B, HWA, 1) by stride, from the RPN's maps (B, A, H, W)."""
        logits = [x.permute(0, 2, 3, 1).flatten(1).unsqueeze(2) for x in maps]
        return dict(zip(self._rpn_strides(), logits, strict=True))

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
            generator = model.proposal_generator.anchor_generator
            outputs.anchors = dict(
                zip(self._rpn_strides(), grid_anchors(generator, self._rpn_maps(named)), strict=True)
            )
        if "objectness" in want and targets is None:
            outputs.objectness = self._objectness(model.proposal_generator.rpn_head(self._rpn_maps(named))[0])
        if "losses" in want:
            outputs.losses_of = partial(self._losses_of, batched_inputs, images, named)
        if "proposals" in want:
            outputs.classify = torch.no_grad()(lambda boxes: self._class_logits(named, boxes))
        if "detections" in want:
            outputs.detections = self._detect(batched_inputs, images, named)
        if targets is not None:
            with self._recorded_objectness("objectness" in want) as maps:
                proposals, proposal_losses = self._propose(batched_inputs, images, named, targets)
            if maps:
                outputs.objectness = self._objectness(maps)
            if "proposals" in want and not model.training:
                outputs.proposals = self._sampled(named, model.roi_heads.label_and_sample_proposals(proposals, targets))
            with self._recorded("proposals" in want and model.training) as (boxes, logits):
                sampled, head_losses = model.roi_heads(images, named, proposals, targets)
            if boxes:
                labels = torch.cat([x.gt_classes for x in sampled])
                outputs.proposals = SampledProposals(boxes[0], logits[0], labels)
            if model.vis_period > 0 and get_event_storage().iter % model.vis_period == 0:
                # The visualizer converts the boxes to NumPy arrays.
                on_cpu = [{**entry, "instances": entry["instances"].to("cpu")} for entry in batched_inputs]
                model.visualize_training(on_cpu, proposals)
            outputs.losses = {**head_losses, **proposal_losses}
        return outputs

    def _detect(self, batched_inputs: list[dict], images: ImageList, named: dict[str, Tensor]) -> list[Instances]:
        """Return the final detections. A model with its own `inference` runs it, with its own pass of the backbone."""
        if type(self.model).inference is not GeneralizedRCNN.inference:
            return [result["instances"] for result in self.model.inference(list(map(unscaled, batched_inputs)))]
        proposals, _ = self._propose(batched_inputs, images, named, None)
        return self.in_input_pixels(self.model.roi_heads(images, named, proposals, None)[0], images)

    def _losses_of(
        self,
        batched_inputs: list[dict],
        images: ImageList,
        named: dict[str, Tensor],
        features: dict[int, Tensor],
        targets: list[Instances],
    ) -> dict[str, Tensor]:
        changed = {name: features[stride] for name, stride in self._stride_of.items()}
        parts = [part for part in (self.model.proposal_generator, self.model.roi_heads) if part is not None]
        with box_losses_of(*parts):
            proposals, losses = self._propose(batched_inputs, images, {**named, **changed}, targets)
            _, head_losses = self.model.roi_heads(images, {**named, **changed}, proposals, targets)
        return {**losses, **head_losses}

    def _propose(
        self, batched_inputs: list[dict], images: ImageList, named: dict[str, Tensor], targets: list[Instances] | None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return the proposals and losses of the RPN, or the precomputed proposals from the data."""
        if self.model.proposal_generator is None:
            return [x["proposals"].to(self.model.device) for x in batched_inputs], {}
        return self.model.proposal_generator(images, named, targets)

    @contextlib.contextmanager
    def _recorded(self, wanted: bool) -> Iterator[tuple[list[list[Boxes]], list[Tensor]]]:
        """Record the boxes of each image and the class logits of the box head's first stage within this context."""
        boxes: list[list[Boxes]] = []
        logits: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            if wanted:
                pooler, predictor = self.model.roi_heads.box_pooler, box_predictors(self.model.roi_heads)[0]
                hooks.enter_context(pooler.register_forward_pre_hook(lambda _, args: boxes.append(list(args[1]))))
                hooks.enter_context(predictor.register_forward_hook(lambda _, args, out: logits.append(out[0])))
            yield boxes, logits

    @contextlib.contextmanager
    def _recorded_objectness(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Record the RPN's objectness maps (B, A, H, W) within this context."""
        maps: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            if wanted:
                head = self.model.proposal_generator.rpn_head
                hooks.enter_context(head.register_forward_hook(lambda _, args, out: maps.extend(out[0])))
            yield maps

    def _class_logits(self, named: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Return the class logits (N, K + 1) of the box head's first stage, which is trained on the proposals."""
        heads = self.model.roi_heads
        box_head = heads.box_head[0] if isinstance(heads.box_head, nn.ModuleList) else heads.box_head
        pooled = heads.box_pooler([named[name] for name in heads.box_in_features], boxes)
        return box_predictors(heads)[0](box_head(pooled))[0]

    def _sampled(self, named: dict[str, Tensor], proposals: list[Instances]) -> SampledProposals:
        """Classify labeled proposals in eval mode, in which the box head does not sample proposals itself."""
        boxes = [x.proposal_boxes for x in proposals]
        return SampledProposals(boxes, self._class_logits(named, boxes), torch.cat([x.gt_classes for x in proposals]))


def _classifies_by_softmax(heads: nn.Module) -> bool:
    """Return whether these are Detectron2's softmax box heads, which return their sampled proposals in training."""
    own = tuple(getattr(type(heads), method, None) for method in TRAINING_PASS)
    if own not in [tuple(getattr(cls, m) for m in TRAINING_PASS) for cls in (StandardROIHeads, CascadeROIHeads)]:
        return False
    return all(isinstance(p, FastRCNNOutputLayers) and not p.use_sigmoid_ce for p in box_predictors(heads))


def box_predictors(heads: nn.Module) -> list[nn.Module]:
    """Return the box predictors: one, or one per stage of a cascade."""
    predictor = getattr(heads, "box_predictor", None)
    return list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]
