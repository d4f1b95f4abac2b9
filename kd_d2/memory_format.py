"""The order of a detector's weights in memory."""

from __future__ import annotations

from detectron2.config import CfgNode


def has_channels_last(cfg: CfgNode, choice: bool | None) -> bool:
    """What a CHANNELS_LAST key means: None is True on a CPU, where convolutions are faster so."""
    return cfg.MODEL.DEVICE == "cpu" if choice is None else choice
