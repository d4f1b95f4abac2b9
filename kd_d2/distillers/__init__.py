"""Distillation methods, each registered by name in DISTILLER_REGISTRY, and the API for writing new ones."""

from ..distributed import count_of, mean_count_across_ranks
from ..keys import Above, AtLeast, AtMost, Below, Condition, OneOf
from .adaptation import Adaptation, AdaptationLayers
from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    Losses,
    OptimizerSettings,
    ParamGroup,
    Weight,
    build_distiller,
    in_float32,
    log_scalar,
)
from .bckd import BCKD
from .crosskd import CrossKD
from .cwd import CWD
from .defeat import DeFeat
from .diffkd import DiffKD
from .dist import DIST
from .dkd import DKD
from .feature_imitation import FeatureImitation
from .fgd import FGD
from .fgfi import FGFI
from .fkd import FKD
from .freekd import FreeKD
from .frs import FRS
from .gid import GID
from .icd import ICD
from .ima import IMA
from .ld import LD
from .maskd import MasKD
from .matching import check_same_anchors, common_strides
from .mgd import MGD
from .pair import Pair
from .pfi import PFI
from .pkd import PKD
from .rank_mimicking import RankMimicking
from .reviewkd import ReviewKD
from .schedule import Schedule
from .soft_label import SoftLabel
from .structural import StructuralKD

__all__ = [
    "BCKD",
    "CWD",
    "DIST",
    "DISTILLER_REGISTRY",
    "DKD",
    "FGD",
    "FGFI",
    "FKD",
    "FRS",
    "GID",
    "ICD",
    "IMA",
    "LD",
    "MGD",
    "PFI",
    "PKD",
    "Above",
    "Adaptation",
    "AdaptationLayers",
    "AtLeast",
    "AtMost",
    "Below",
    "Condition",
    "CrossKD",
    "DeFeat",
    "DiffKD",
    "Distiller",
    "FeatureImitation",
    "FreeKD",
    "Losses",
    "MasKD",
    "OneOf",
    "OptimizerSettings",
    "Pair",
    "ParamGroup",
    "RankMimicking",
    "ReviewKD",
    "Schedule",
    "SoftLabel",
    "StructuralKD",
    "Weight",
    "build_distiller",
    "check_same_anchors",
    "common_strides",
    "count_of",
    "in_float32",
    "log_scalar",
    "mean_count_across_ranks",
]
