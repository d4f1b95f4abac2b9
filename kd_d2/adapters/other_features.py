"""Contexts in which a detector computes losses of features that are not its own, without being changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from detectron2.utils.events import EventStorage
from torch import nn

PARTS_WITH_STATE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Layers that stay in their mode: statistics would change, and dropout is not wanted."""
OTHER_PARTS = ("mask_on", "keypoint_on")
"""Switches of RoI heads for what they predict besides boxes."""


@contextlib.contextmanager
def normalized_by_this_batch(model: nn.Module) -> Iterator[None]:
    """Let a dense detector of Detectron2 divide losses by the count of the batch, not by a moving average, and log nothing."""
    model._ema_update = lambda name, value, initial_value, momentum=0.9: value
    try:
        with EventStorage():
            yield
    finally:
        del model._ema_update


@contextlib.contextmanager
def box_losses_of(*parts: nn.Module) -> Iterator[None]:
    """Let an RPN and RoI heads compute losses of boxes, as in training, and log nothing."""
    modules = [m for part in parts for m in part.modules() if not isinstance(m, PARTS_WITH_STATE)]
    modes = [(module, module.training) for module in modules]
    switches = [(part, name, getattr(part, name)) for part in parts for name in OTHER_PARTS if hasattr(part, name)]
    try:
        for module in modules:
            module.training = True
        for part, name, _ in switches:
            setattr(part, name, False)
        with EventStorage():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for part, name, value in switches:
            setattr(part, name, value)
