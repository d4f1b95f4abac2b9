"""Boxes and anchors of MMDetection."""

from __future__ import annotations

from typing import Any

from .settings import Settings

UNIT_STDS = (1.0, 1.0, 1.0, 1.0)


def box_coder(head: Settings, default_stds: tuple[float, ...] = UNIT_STDS) -> Settings:
    """Return the settings of a head's box regression, which must be that of R-CNNs, with unread `target_stds`.

    Args:
        default_stds: deviations of a head without such settings.
    """
    coder = head.node("bbox_coder", {"type": "DeltaXYWHBBoxCoder", "target_stds": default_stds})
    coder.only(type="DeltaXYWHBBoxCoder", target_means=(0.0, 0.0, 0.0, 0.0), clip_border=True, add_ctr_clamp=False)
    return coder


def regression_weights(coder: Settings) -> tuple[float, ...]:
    """Return Detectron2's weights of the four box deltas, by which they are divided; MMDetection multiplies by deviations."""
    return tuple(1 / std for std in coder.numbers("target_stds", UNIT_STDS))


def nms_threshold(test: Settings, default: dict[str, Any] | None = None) -> float:
    """Return the IoU threshold of test settings, whose entry "nms", or the default, must be the usual NMS."""
    nms = test.node("nms") if default is None else test.node("nms", default)
    nms.only(type="nms")
    return nms.number("iou_threshold", nms.read("iou_thr", None))  # the latter in early versions of MMDetection 2


def anchor_generator(head: Settings, strides: tuple[int, ...]) -> Settings:
    """Return the settings of a head's anchors, of which sizes and ratios are unread."""
    anchors = head.node("anchor_generator")
    anchors.only(type="AnchorGenerator", strides=strides, center_offset=0.0, scale_major=True)
    return anchors
