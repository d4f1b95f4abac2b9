"""Distillation methods, each registered by name in DISTILLER_REGISTRY."""

from .base import DISTILLER_REGISTRY, Distiller, OptimizerSettings, ParamGroup, Schedule
from .crosskd import CrossKD
from .defeat import DeFeat
from .dist import DIST
from .dkd import DKD
from .feature_imitation import FeatureImitation
from .fgfi import FGFI
from .fkd import FKD
from .gid import GID
from .icd import ICD
from .ima import IMA
from .ld import LD
from .pfi import PFI
from .rank_mimicking import RankMimicking
from .soft_label import SoftLabel
from .structural import StructuralKD

__all__ = [
    "DIST",
    "DISTILLER_REGISTRY",
    "DKD",
    "FGFI",
    "FKD",
    "GID",
    "ICD",
    "IMA",
    "LD",
    "PFI",
    "CrossKD",
    "DeFeat",
    "Distiller",
    "FeatureImitation",
    "OptimizerSettings",
    "ParamGroup",
    "RankMimicking",
    "Schedule",
    "SoftLabel",
    "StructuralKD",
]
