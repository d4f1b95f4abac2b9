"""Detectors and backbones that Detectron2 does not have. Importing this package registers them."""

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.registry import Registry

from ..keys import Keys
from .anchors import TorchvisionAnchorGenerator
from .atss import ATSS, ATSSKeys
from .fcos import FCOS, FCOSKeys
from .fsaf import FSAF, FSAFKeys
from .gfl import GFL, GFLKeys
from .mobilenet import MobileNetV2, MobileNetV2Keys
from .necks import DenseFPNKeys
from .reppoints import RepPoints, RepPointsKeys
from .slim_resnet import SlimResNetKeys, add_slim_resnet_config
from .swin import Swin, SwinKeys
from .timm_network import TimmKeys, TimmNetwork

__all__ = [
    "ATSS",
    "FCOS",
    "FSAF",
    "GFL",
    "MODELING_KEYS",
    "MobileNetV2",
    "RepPoints",
    "Swin",
    "TimmNetwork",
    "TorchvisionAnchorGenerator",
    "add_modeling_config",
    "add_slim_resnet_config",
    "unused_nodes",
]

BACKBONES: dict[str, type[Keys]] = {
    "SLIM_RESNET": SlimResNetKeys,
    "MOBILENET_V2": MobileNetV2Keys,
    "SWIN": SwinKeys,
    "TIMM": TimmKeys,
    "DENSE_FPN": DenseFPNKeys,
}
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
    """Return the names of these nodes that the config's detector does not use.

    A detector or backbone from elsewhere may use each node that has other values than the defaults.
    """
    backbone, detector = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.META_ARCHITECTURE
    defaults = CfgNode({"MODEL": {}})
    add_modeling_config(defaults)
    may_use_any = not (_is_known(BACKBONE_REGISTRY, backbone) and _is_known(META_ARCH_REGISTRY, detector))
    words = {*backbone.upper().split("_")}
    used = {name for name in BACKBONES if words.issuperset(name.split("_"))} | {detector.upper()}
    used |= {name for name in MODELING_KEYS if may_use_any and cfg.MODEL[name] != defaults.MODEL[name]}
    return [name for name in MODELING_KEYS if name not in used]


def _is_known(registry: Registry, name: str) -> bool:
    """Return whether an entry of a registry comes from Detectron2 or this library."""
    return registry.get(name).__module__.partition(".")[0] in ("detectron2", __name__.partition(".")[0])
