"""Copies from the host to a GPU for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def instances_on_device(instances: Instances, device: torch.device) -> Instances:
    """`instances.to(device)`, which waits for each field."""
    moved = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = Boxes(value.tensor.to(device, non_blocking=True))
        elif isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
        elif hasattr(value, "to"):
            value = value.to(device)
        moved.set(name, value)
    return moved
