"""Channels-last memory format for the weights of detectors, and shapes that PyTorch's convolutions on CPUs get wrong."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

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


def pad_narrow_maps(model: nn.Module) -> None:
    """Let strided convolutions pad maps that are narrower than their stride with zeros, which does not change the output.

    Of such maps PyTorch computes wrong gradients of the weights, up to NaN, in bfloat16 on a CPU.
    """
    for module in model.modules():  # PyTorch 2.14.1, oneDNN: kernels of 3x3 and more, any number of channels and groups
        if isinstance(module, nn.Conv2d) and module.stride[1] > 1 and _keeps_the_middle(module):
            module.register_forward_pre_hook(_pad_narrow_map)


def _keeps_the_middle(convolution: nn.Conv2d) -> bool:
    """Return whether a map of up to one stride in width has an output of width 1."""
    reach = convolution.dilation[1] * (convolution.kernel_size[1] - 1)
    return reach > 0 and convolution.padding_mode == "zeros" and 2 * convolution.padding[1] == reach


def _pad_narrow_map(convolution: nn.Conv2d, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    missing = convolution.stride[1] - inputs[0].shape[-1]
    return (F.pad(inputs[0], (0, missing)),) if missing > 0 else None
