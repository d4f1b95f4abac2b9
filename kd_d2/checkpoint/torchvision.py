"""Backbone weights in torchvision's format: detection, renaming, and required input format."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from ..errors import UserError

StateDict = dict[str, Tensor]

_RESNET_RULES = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def rename_torchvision_resnet(weights: StateDict, prefix: str = "") -> StateDict:
    """Rename torchvision's ResNet weights to Detectron2's names after `prefix`, without the classifier `fc`."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("fc."):
            continue
        for pattern, replacement in _RESNET_RULES:
            name = re.sub(pattern, replacement, name)
        renamed[prefix + name] = tensor
    return renamed


def rename_torchvision_mobilenet(weights: StateDict, prefix: str = "") -> StateDict:
    """Add `prefix` to torchvision's MobileNetV2 names, which this library uses; drop layers after the last stage."""
    return {prefix + n: t for n, t in weights.items() if not n.startswith(("classifier.", "features.18."))}


@dataclass(frozen=True)
class TorchvisionFormat:
    """A family of torchvision classifiers.

    Attributes:
        architecture: name of the family in messages.
        names: names of some of its tensors that identify a file.
        first: name of its first tensor in the bottom-up network of a detector.
        rename: (weights, prefix) -> weights with the detector's names.
    """

    architecture: str
    names: frozenset[str]
    first: str
    rename: Callable[[StateDict, str], StateDict]


FORMATS = (
    TorchvisionFormat(
        "ResNet",
        frozenset({"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}),
        "stem.conv1.weight",
        rename_torchvision_resnet,
    ),
    TorchvisionFormat(
        "MobileNetV2",
        frozenset({"features.0.0.weight", "features.1.conv.0.0.weight", "features.17.conv.1.0.weight"}),
        "features.0.0.weight",
        rename_torchvision_mobilenet,
    ),
)


def torchvision_format(weights: StateDict) -> TorchvisionFormat | None:
    """Return the family that the weights' names identify, or None if they are not in torchvision's format."""
    return next((f for f in FORMATS if f.names <= weights.keys()), None)


TORCHVISION_INPUT = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}


def other_input(model: nn.Module, needed: dict[str, Any]) -> str | None:
    """Return the first key of `needed` with another value in a detector, as "KEY value; the config says value", or None."""
    actual = {
        "INPUT.FORMAT": getattr(model, "input_format", None),
        "MODEL.PIXEL_MEAN": [round(value, 3) for value in model.pixel_mean.flatten().tolist()],
        "MODEL.PIXEL_STD": [round(value, 3) for value in model.pixel_std.flatten().tolist()],
    }
    for key, wanted in needed.items():
        value = actual[key]
        same = value == wanted if isinstance(wanted, str) else np.allclose(value, wanted, atol=1e-2)
        if value is not None and not same:
            return f"{key} {wanted}; the config says {value}"
    return None


def check_torchvision_input(model: nn.Module, path: str) -> None:
    """Raise a UserError if a detector's input format, normalization or strides differ from torchvision's."""
    if other := other_input(model, TORCHVISION_INPUT):
        raise UserError(f"{path} holds weights in torchvision's format, which need {other}.")
    if any(m.conv1.stride > m.conv2.stride for m in model.modules() if isinstance(m, BottleneckBlock)):
        raise UserError(
            f"{path} holds weights in torchvision's format, which need MODEL.RESNETS.STRIDE_IN_1X1 False; the config says True."
        )
