"""Detectron2's FCOS by yaml."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos

from .dense import add_dense_keys, dense_arguments


def add_fcos_config(cfg: CfgNode) -> None:
    """Add MODEL.FCOS."""
    node = cfg.MODEL.FCOS = CfgNode()
    add_dense_keys(node)
    # A point is positive within so many strides of the centre of a box.
    node.CENTER_SAMPLING_RADIUS = 1.5
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS (Tian et al. 2019), which has no yaml of its own, as MODEL.FCOS says."""

    @configurable
    def __init__(self, *, input_format: str = "BGR", **arguments: Any):
        """
        Args:
            input_format: order of the channels that pixel_mean is in.
            arguments: those of Detectron2's FCOS.
        """
        super().__init__(**arguments)
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.FCOS
        detector, head = dense_arguments(cfg, node)
        return {
            **detector,
            "head": fcos.FCOSHead(**head),
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }
