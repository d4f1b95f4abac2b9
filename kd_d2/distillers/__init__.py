"""Distillation methods, each registered by name in DISTILLER_REGISTRY."""

from .base import DISTILLER_REGISTRY, Distiller, OptimizerSettings, ParamGroup, Schedule
from .feature_imitation import FeatureImitation
from .icd import ICD
from .ima import IMA
from .pfi import PFI
from .rank_mimicking import RankMimicking
from .soft_label import SoftLabel
from .structural import StructuralKD

__all__ = [
    "DISTILLER_REGISTRY",
    "ICD",
    "IMA",
    "PFI",
    "Distiller",
    "FeatureImitation",
    "OptimizerSettings",
    "ParamGroup",
    "RankMimicking",
    "Schedule",
    "SoftLabel",
    "StructuralKD",
]
