"""Backbones' weights in torchvision's format: which they are, what they are called in Detectron2, and the input they want."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
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
    """torchvision's ResNet names as Detectron2's, behind `prefix`; the classifier `fc` is left out."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("fc."):
            continue
        for pattern, replacement in _RESNET_RULES:
            name = re.sub(pattern, replacement, name)
        renamed[prefix + name] = tensor
    return renamed


def rename_torchvision_mobilenet(weights: StateDict, prefix: str = "") -> StateDict:
    """torchvision's MobileNetV2 names, which are ours too, behind `prefix`, without what follows the last stage."""
    return {prefix + n: t for n, t in weights.items() if not n.startswith(("classifier.", "features.18."))}


@dataclass(frozen=True)
class TorchvisionFormat:
    """A family of torchvision's classifiers.

    Attributes:
        architecture: what users call it.
        names: some of its tensors, by which a file is recognized.
        first: what its first tensor is called in our bottom-up network.
        rename: (weights, prefix) -> weights under our names.
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
    """The family whose names these are; None where they are no file of torchvision's."""
    return next((f for f in FORMATS if f.names <= weights.keys()), None)


TORCHVISION_INPUT = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}


def check_torchvision_input(model: nn.Module, path: str) -> None:
    """Raise a UserError where a detector would feed torchvision's weights other pixels, or has other strides."""
    actual = {
        "INPUT.FORMAT": getattr(model, "input_format", None),
        "MODEL.PIXEL_MEAN": model.pixel_mean.flatten().tolist(),
        "MODEL.PIXEL_STD": model.pixel_std.flatten().tolist(),
    }
    for key, needed in TORCHVISION_INPUT.items():
        value = actual[key]
        same = value == needed if isinstance(needed, str) else np.allclose(value, needed, atol=1e-2)
        if value is not None and not same:
            raise UserError(
                f"{path} holds weights in torchvision's format, which need {key} {needed}; the config says {value}."
            )
    strided = [m for m in model.modules() if type(m).__name__ == "BottleneckBlock" and m.conv1.stride != m.conv2.stride]
    if any(m.conv1.stride > m.conv2.stride for m in strided):
        raise UserError(
            f"{path} holds weights in torchvision's format, which need MODEL.RESNETS.STRIDE_IN_1X1 False; the config says True."
        )
