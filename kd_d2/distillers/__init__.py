"""Distillation methods, each registered by name in DISTILLER_REGISTRY."""

from .base import DISTILLER_REGISTRY, Distiller, OptimizerSettings, ParamGroup, Schedule
from .feature_imitation import FeatureImitation
from .icd import ICD
from .structural import StructuralKD

__all__ = [
    "DISTILLER_REGISTRY",
    "ICD",
    "Distiller",
    "FeatureImitation",
    "OptimizerSettings",
    "ParamGroup",
    "Schedule",
    "StructuralKD",
]
