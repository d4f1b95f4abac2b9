"""torch.compile for the backbone of a detector, with a fallback."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from .errors import UserError

logger = logging.getLogger(__name__)


def compile_backbone(model: nn.Module, key: str) -> None:
    """Compile the forward pass of a detector's backbone with `torch.compile`, for images of any size.

    If compilation fails, a warning is logged and the backbone runs uncompiled. The state_dict does not change.

    Args:
        key: config key that enables it, for messages.

    Raises:
        UserError: the model has no backbone.
    """
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise UserError(f"{key} is True, but {type(model).__name__} has no backbone to compile; set it to False.")
    model.backbone.forward = _Compiled(model.backbone.forward, key)


class _Compiled:
    def __init__(self, function: Callable, key: str):
        self.function = function
        self.fast = torch.compile(function, dynamic=True)
        self.key = key

    def __call__(self, *args: object) -> object:
        try:
            return self.fast(*args)
        except Exception as error:
            if self.fast is self.function:
                raise
            reason = str(error).strip().partition("\n")[0]
            logger.warning(f"{self.key}: compilation failed ({reason}); the backbone runs uncompiled.")
            self.fast = self.function
            return self.function(*args)
