"""torch.compile for the backbone of a detector, with a fallback."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from .errors import UserError, is_out_of_memory

logger = logging.getLogger(__name__)


def compile_backbone(model: nn.Module, key: str, *, channels_last: bool = False) -> None:
    """Compile a detector's backbone with `torch.compile`.

    The forward pass is compiled once for images of any size. So is the backward pass with channels-last weights; with
    others, Inductor specializes gradients of convolutions to the image size, and compiles again for a new one.
    If compilation fails, a warning is logged and the backbone runs uncompiled. The state_dict does not change.

    Args:
        key: config key that enables it, for messages.
        channels_last: whether its weights are in channels-last format.

    Raises:
        UserError: the model has no backbone.
    """
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise UserError(f"{key} is True, but {type(model).__name__} has no backbone to compile; set it to False.")
    _allow_retained_graphs()
    model.backbone.forward = _Compiled(model.backbone.forward, key, channels_last)


def _allow_retained_graphs() -> None:
    """Let a compiled graph be retained in a backward pass (gradient balancing) even if it was not in its first one.

    The default of PyTorch's option is changed, since a value that is set applies to the current thread only, and autograd
    runs backward passes on a GPU in other threads.
    """
    torch._functorch.config._config["donated_buffer"].default = False


class _Compiled:
    """A compiled `forward` of a backbone; a deep copy of the backbone compiles its own."""

    def __init__(self, function: MethodType, key: str, channels_last: bool):
        self.function = function
        self.channels_last = channels_last
        self.has_compiled_backward = False
        self.fast: Callable | None = None
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.key = key

    def __call__(self, images: Tensor) -> object:
        images = images.to(memory_format=self.memory_format)
        if self.fast is not self.function:
            try:
                if self.fast is None:
                    options = {"force_layout_optimization": True} if self.channels_last else None
                    self.fast = torch.compile(self.function, dynamic=True, options=options)
                outputs = self.fast(images)
                if torch.is_grad_enabled() and not self.has_compiled_backward:
                    self._compile_backward(outputs)
                return outputs
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0]
            logger.warning(f"{self.key}: compilation failed ({reason}); the backbone runs uncompiled.")
            self.fast = self.function
        return self.function(images)

    def _compile_backward(self, outputs: dict[str, Tensor] | Tensor) -> None:
        """Run the backward pass once: PyTorch hides errors of its compilation until it runs."""
        maps = outputs.values() if isinstance(outputs, dict) else [outputs]
        maps = [x for x in maps if x.requires_grad]
        parameters = [p for p in self.function.__self__.parameters() if p.requires_grad]
        if maps and parameters:
            torch.autograd.grad(maps, parameters, [x.detach() for x in maps], retain_graph=True, allow_unused=True)
        self.has_compiled_backward = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return _Compiled(copy.deepcopy(self.function, memo), self.key, self.channels_last)
