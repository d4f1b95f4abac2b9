"""Distillation methods, each registered by name in DISTILLER_REGISTRY."""

from .base import DISTILLER_REGISTRY, Distiller, OptimizerSettings, ParamGroup, Schedule
from .cwd import CWD
from .defeat import DeFeat
from .feature_imitation import FeatureImitation
from .fgd import FGD
from .fgfi import FGFI
from .fkd import FKD
from .gid import GID
from .icd import ICD
from .ima import IMA
from .mgd import MGD
from .pfi import PFI
from .pkd import PKD
from .rank_mimicking import RankMimicking
from .soft_label import SoftLabel
from .structural import StructuralKD

__all__ = [
    "CWD",
    "DISTILLER_REGISTRY",
    "FGD",
    "FGFI",
    "FKD",
    "GID",
    "ICD",
    "IMA",
    "MGD",
    "PFI",
    "PKD",
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
