"""Channels-last memory format for the weights of detectors, and maps that PyTorch's convolutions on CPUs get wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from types import MethodType

import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead
from torch import Tensor, nn

from .errors import UserError

NARROW = 16


def has_channels_last(cfg: CfgNode, choice: bool | None) -> bool:
    """Resolve a CHANNELS_LAST key: None means True on a CPU, where convolutions are then faster."""
    return cfg.MODEL.DEVICE == "cpu" if choice is None else choice


def trains_with_channels_last(cfg: CfgNode, model: nn.Module) -> bool:
    """Resolve SOLVER.CHANNELS_LAST for a model.

    None means True on a CPU and with SOLVER.COMPILE (see `compile_backbone`), except for a model whose gradients
    PyTorch cannot compute in this format.

    Raises:
        UserError: it is True for such a model.
    """
    crashing = [name for name, module in model.named_modules() if cfg.MODEL.DEVICE == "cpu" and _crashes(module)]
    if cfg.SOLVER.CHANNELS_LAST and crashing:
        raise UserError(
            f"SOLVER.CHANNELS_LAST is True, but PyTorch crashes in the gradient of {crashing[0]}, a strided 1x1 convolution with fewer than "
            f"{NARROW} channels, in channels-last format on a CPU; set it to False."
        )
    wanted = has_channels_last(cfg, cfg.SOLVER.CHANNELS_LAST)
    if cfg.SOLVER.CHANNELS_LAST is None and cfg.SOLVER.COMPILE:
        wanted = True
    return wanted and not crashing


def _crashes(module: nn.Module) -> bool:
    """Return whether the backward pass writes out of bounds."""
    return (  # PyTorch 2.14.1, oneDNN, AVX-512: 1x1, stride 2, 4 to 8, 8 to 12 and 12 to 16 channels
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < NARROW
    )


def to_channels_last(model: nn.Module) -> None:
    """Store the weights of a model in channels-last format.

    The heatmaps of keypoint heads stay contiguous: Detectron2 reads them with `view`.
    """
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, BaseKeypointRCNNHead):
            module.layers = partial(_contiguous_layers, module)


def _contiguous_layers(head: BaseKeypointRCNNHead, features: Tensor) -> Tensor:
    return type(head).layers(head, features).contiguous()


@contextlib.contextmanager
def narrow_maps_in_float32(model: nn.Module) -> Iterator[None]:
    """Context in which strided convolutions run without autocast on maps that are narrower than their stride.

    Of such maps PyTorch computes wrong gradients of the weights, up to NaN, in bfloat16 on a CPU.
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():  # PyTorch 2.14.1, oneDNN: kernels of 2x2 and more with padding, any channels
            if isinstance(module, nn.Conv2d) and module.stride[1] > 1 and "forward" not in vars(module):
                module.forward = MethodType(_forward, module)
                stack.callback(delattr, module, "forward")
        yield


def _forward(convolution: nn.Conv2d, *args: Tensor, **kwargs: Tensor) -> Tensor:
    [maps] = [*args, *kwargs.values()]
    forward = type(convolution).forward
    if maps.shape[-1] >= convolution.stride[1]:
        return forward(convolution, maps)
    with torch.autocast(maps.device.type, enabled=False):
        return forward(convolution, maps.to(convolution.weight.dtype))
