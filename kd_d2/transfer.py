"""Copies from the CPU to a GPU without synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Copy Python numbers to a tensor on the device without blocking."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def instances_on_device(instances: Instances, device: torch.device) -> Instances:
    """Return a copy of `instances` on the device, like `Instances.to` but without blocking for tensors and boxes.

    Classes become integers: those of an image without objects may be `torch.tensor([])`.
    """
    moved = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = type(value)(value.tensor.to(device, non_blocking=True))
        elif isinstance(value, Tensor):
            value = value.to(device, torch.int64 if name == "gt_classes" else None, non_blocking=True)
        elif hasattr(value, "to"):
            value = value.to(device)
        moved.set(name, value)
    return moved
