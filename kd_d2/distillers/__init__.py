"""Distillation methods, each registered by name in DISTILLER_REGISTRY."""

from .base import DISTILLER_REGISTRY, Distiller, OptimizerSettings, ParamGroup, Schedule
from .feature_imitation import FeatureImitation
from .structural import StructuralKD

__all__ = [
    "DISTILLER_REGISTRY",
    "Distiller",
    "FeatureImitation",
    "OptimizerSettings",
    "ParamGroup",
    "Schedule",
    "StructuralKD",
]
