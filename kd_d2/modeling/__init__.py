"""Detectors and backbones that Detectron2 lacks; importing registers them."""

from detectron2.config import CfgNode

from .atss import ATSS, add_atss_config
from .fcos import FCOS, add_fcos_config
from .fsaf import FSAF, add_fsaf_config
from .gfl import GFL, add_gfl_config
from .mobilenet import MobileNetV2, add_mobilenet_v2_config
from .reppoints import RepPoints, add_reppoints_config
from .slim_resnet import add_slim_resnet_config

__all__ = [
    "ATSS",
    "FCOS",
    "FSAF",
    "GFL",
    "MobileNetV2",
    "RepPoints",
    "add_modeling_config",
    "add_slim_resnet_config",
    "unused_nodes",
]

BACKBONES = {"SLIM_RESNET": add_slim_resnet_config, "MOBILENET_V2": add_mobilenet_v2_config}
DETECTORS = {
    "FCOS": add_fcos_config,
    "ATSS": add_atss_config,
    "GFL": add_gfl_config,
    "FSAF": add_fsaf_config,
    "REPPOINTS": add_reppoints_config,
}


def add_modeling_config(cfg: CfgNode) -> None:
    """Add the keys of all of them: a node of MODEL each."""
    for add in (*BACKBONES.values(), *DETECTORS.values()):
        add(cfg)


def unused_nodes(cfg: CfgNode) -> list[str]:
    """Those of these nodes that the config's own detector does not read."""
    backbones = [name for name in BACKBONES if name.lower() not in cfg.MODEL.BACKBONE.NAME]
    return backbones + [name for name in DETECTORS if name != cfg.MODEL.META_ARCHITECTURE.upper()]
