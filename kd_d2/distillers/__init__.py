"""Distillation methods, each registered by name in DISTILLER_REGISTRY."""

from .base import DISTILLER_REGISTRY, Distiller, OptimizerSettings, ParamGroup
from .crosskd import CrossKD
from .cwd import CWD
from .defeat import DeFeat
from .dist import DIST
from .dkd import DKD
from .feature_imitation import FeatureImitation
from .fgd import FGD
from .fgfi import FGFI
from .fkd import FKD
from .gid import GID
from .icd import ICD
from .ima import IMA
from .ld import LD
from .mgd import MGD
from .pfi import PFI
from .pkd import PKD
from .rank_mimicking import RankMimicking
from .schedule import Schedule
from .soft_label import SoftLabel
from .structural import StructuralKD

__all__ = [
    "CWD",
    "DIST",
    "DISTILLER_REGISTRY",
    "DKD",
    "FGD",
    "FGFI",
    "FKD",
    "GID",
    "ICD",
    "IMA",
    "LD",
    "MGD",
    "PFI",
    "PKD",
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
