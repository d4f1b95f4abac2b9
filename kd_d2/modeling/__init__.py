"""Detectors and backbones that Detectron2 does not have. Importing this package registers them."""

from detectron2.config import CfgNode

from ..keys import Keys
from .atss import ATSS, ATSSKeys
from .fcos import FCOS, FCOSKeys
from .fsaf import FSAF, FSAFKeys
from .gfl import GFL, GFLKeys
from .mobilenet import MobileNetV2, MobileNetV2Keys
from .reppoints import RepPoints, RepPointsKeys
from .slim_resnet import SlimResNetKeys, add_slim_resnet_config

__all__ = [
    "ATSS",
    "FCOS",
    "FSAF",
    "GFL",
    "MODELING_KEYS",
    "MobileNetV2",
    "RepPoints",
    "add_modeling_config",
    "add_slim_resnet_config",
    "unused_nodes",
]

BACKBONES: dict[str, type[Keys]] = {"SLIM_RESNET": SlimResNetKeys, "MOBILENET_V2": MobileNetV2Keys}
DETECTORS: dict[str, type[Keys]] = {
    "FCOS": FCOSKeys,
    "ATSS": ATSSKeys,
    "GFL": GFLKeys,
    "FSAF": FSAFKeys,
    "REPPOINTS": RepPointsKeys,
}
MODELING_KEYS = {**BACKBONES, **DETECTORS}
"""Config keys of each detector and backbone by its node of MODEL."""


def add_modeling_config(cfg: CfgNode) -> None:
    """Add the config keys of all detectors and backbones: one node of MODEL each."""
    for name, keys in MODELING_KEYS.items():
        cfg.MODEL[name] = CfgNode()
        keys.add_to(cfg.MODEL[name])


def unused_nodes(cfg: CfgNode) -> list[str]:
    """Return the names of these nodes that the config's detector does not use."""
    backbones = [name for name in BACKBONES if name.lower() not in cfg.MODEL.BACKBONE.NAME]
    return backbones + [name for name in DETECTORS if name != cfg.MODEL.META_ARCHITECTURE.upper()]
