"""Reading of torchvision's detectors: checkpoints, and torchvision's own weights."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass

import torch
import torchvision

from ..checkpoint import StateDict
from ..checkpoint.reading import check_weights, read_tensors_and_text
from ..errors import UserError
from ..plain_yaml import read_text

logger = logging.getLogger(__name__)

COCO = "coco"
NO_CLASS = "N/A"
WRAPPERS = ("model", "state_dict", "model_state_dict")
"""Entries with the weights in checkpoints that have others too, such as those of torchvision's reference scripts."""
CENTERNESS = "head.regression_head.bbox_ctrness.weight"
"""Weight that only an FCOS has."""
FIRST = "backbone.body.conv1.weight"
"""Weight before whose name others have a prefix, such as those of DistributedDataParallel, torch.compile or Lightning."""


@dataclass(frozen=True)
class TorchvisionDetector:
    """A detector of torchvision.

    Attributes:
        weights: weights by torchvision's names.
        epsilon: of the batch normalization layers of the backbone; None if unknown.
        labels: class names by label, from label 1, "N/A" for labels without a class; None if unknown.
    """

    weights: StateDict
    epsilon: float | None
    labels: tuple[str, ...] | None


def read_detector(source: str) -> TorchvisionDetector:
    """Read a checkpoint, or download torchvision's own weights of a detector.

    Args:
        source: a file, or the name of a detector in torchvision.

    Raises:
        UserError: the file cannot be read or has no weights, or the weights cannot be downloaded.
    """
    names = torchvision.models.list_models(module=torchvision.models.detection)
    if not os.path.exists(source) and source in names:
        imported = [
            name for name in names if re.match(r"(fasterrcnn|maskrcnn|keypointrcnn|retinanet|fcos)_resnet", name)
        ]
        if source not in imported:
            raise UserError(f"The {source} of torchvision cannot be imported; {', '.join(imported)} can.")
        return _pretrained(source)
    content = read_tensors_and_text(source)
    weights = (
        next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
        if isinstance(content, dict)
        else None
    )
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(
            f"{source} has no weights: a checkpoint is needed that was saved with torch.save(model.state_dict(), ...), or a dictionary "
            f"in which {' or '.join(WRAPPERS)} are the weights."
        )
    check_weights(weights, source)
    prefix = next((name.removesuffix(FIRST) for name in weights if name.endswith(FIRST)), "")
    return TorchvisionDetector(
        _renamed({name.removeprefix(prefix): tensor for name, tensor in weights.items()}), None, None
    )


def read_labels(source: str) -> tuple[str, ...]:
    """Return class names by label, from label 1: those of torchvision's COCO, or the lines of a text file.

    Raises:
        UserError: the file cannot be read, has no lines, or has a name twice.
    """
    if source == COCO:
        return _coco()
    names = tuple(line.strip() for line in read_text(source, f"--classes {source}").splitlines() if line.strip())
    if not names:
        raise UserError(f"--classes {source} has no names: one in each line is needed, in the order of the labels.")
    if twice := [name for name in names if names.count(name) > 1 and name != NO_CLASS]:
        raise UserError(f"--classes {source} has the name {twice[0]!r} more than once.")
    return names


def _coco() -> tuple[str, ...]:
    weights = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    return tuple(weights.meta["categories"][1:])


def _pretrained(name: str) -> TorchvisionDetector:
    logger.info(f"Downloading torchvision's weights of {name}")
    try:
        model = torchvision.models.get_model(name, weights="DEFAULT")
    except (OSError, RuntimeError) as error:  # HTTP errors, and a file with another hash
        raise UserError(f"torchvision's weights of {name} cannot be downloaded: {error}.") from error
    epsilon = next((m.eps for n, m in model.named_modules() if n == "backbone.body.bn1"), None)
    labels = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"][1:]
    return TorchvisionDetector(_renamed(model.state_dict()), epsilon, tuple(labels))


def _renamed(weights: StateDict) -> StateDict:
    """Return weights with the names of torchvision 0.13 and later, and of its RetinaNet's towers also for those of an FCOS."""
    layers = 3 if CENTERNESS in weights else 2  # of a tower for each convolution; the third one is a normalization
    return {_name(name, layers): tensor for name, tensor in weights.items()}


def _name(name: str, layers: int) -> str:
    name = re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
    name = re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)
    name = re.sub(
        r"^(head\.(?:classification|regression)_head\.conv)\.(\d+)\.(weight|bias)$",
        lambda m: f"{m[1]}.{int(m[2]) // layers}.{int(m[2]) % layers}.{m[3]}",
        name,
    )
    return re.sub(
        r"^roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)$",
        lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.{m[2]}",
        name,
    )
