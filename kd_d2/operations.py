"""Multiply-adds of a detector."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def detect_nothing(model: nn.Module, height: int, width: int) -> None:
    """Run a detector on a black image."""
    model([{"image": torch.zeros(3, height, width), "height": height, "width": width}])


def multiply_adds(model: nn.Module, height: int, width: int) -> float:
    """Return the multiply-adds for an image size that do not depend on the image.

    They are those of the backbone and the head of a dense detector; in R-CNNs, those of the heads for as many proposals
    as RPN.POST_NMS_TOPK_TEST allows, but not of masks and keypoints; in other models, those of the backbone.
    """
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    divisibility = max(model.backbone.size_divisibility, 1)
    height, width = (-(-side // divisibility) * divisibility for side in (height, width))  # as the detector pads it
    image = torch.zeros(1, 3, height, width, device=device_of(model))
    total = _count(model.backbone, image)
    if isinstance(model, DenseDetector):
        with torch.no_grad():
            features = model.backbone(image)
        maps = [features[name] for name in model.head_in_features]
        total += _count(model.head, (maps,))
    elif isinstance(model, GeneralizedRCNN):
        total += _multiply_adds_of_heads(model, height, width)
    return total


def _count(module: nn.Module, inputs: Any) -> float:
    analysis = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False)
    return analysis.set_op_handle("torchvision::deform_conv2d", _deformable_convolution).total()


def _multiply_adds_of_heads(model: GeneralizedRCNN, height: int, width: int) -> float:
    """Return the multiply-adds of everything but the backbone, with all proposals and without detections."""
    with _without_detections(model), FlopCounterMode(display=False) as counter:
        detect_nothing(model, height, width)
    counts = {module: sum(of_operators.values()) for module, of_operators in counter.get_flop_counts().items()}
    return (counts["Global"] - counts[f"{type(model).__name__}.backbone"]) / 2  # a multiplication and an addition


@contextlib.contextmanager
def _without_detections(model: GeneralizedRCNN) -> Iterator[None]:
    """Let the RPN keep overlapping proposals, and the heads no detection, of which masks would be computed."""
    changed = [(model.proposal_generator, "nms_thresh")]
    changed += [(module, "test_score_thresh") for module in model.modules() if hasattr(module, "test_score_thresh")]
    before = [getattr(module, name, None) for module, name in changed]
    try:
        for module, name in changed:
            setattr(module, name, 1.0)
        yield
    finally:
        for (module, name), value in zip(changed, before, strict=True):
            setattr(module, name, value)


def _deformable_convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the multiply-adds of the convolution itself, without the interpolation."""
    weight, made = (value.type().sizes() for value in (inputs[1], outputs[0]))
    return math.prod(made) * math.prod(weight[1:])
