"""Distillation methods, each registered by name in DISTILLER_REGISTRY."""

from .base import DISTILLER_REGISTRY, Distiller, OptimizerSettings, ParamGroup, Schedule
from .defeat import DeFeat
from .feature_imitation import FeatureImitation
from .fgfi import FGFI
from .fkd import FKD
from .gid import GID
from .icd import ICD
from .ima import IMA
from .pfi import PFI
from .rank_mimicking import RankMimicking
from .soft_label import SoftLabel
from .structural import StructuralKD

__all__ = [
    "DISTILLER_REGISTRY",
    "FGFI",
    "FKD",
    "GID",
    "ICD",
    "IMA",
    "PFI",
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
