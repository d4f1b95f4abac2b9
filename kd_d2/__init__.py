"""kd_d2: knowledge distillation for object detection on Detectron2. Importing it registers everything."""

import warnings

# What Detectron2's own code warns of at every start, and no user of it can mend. The submodules import Detectron2.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
warnings.filterwarnings("ignore", message=r"torch\.meshgrid")

from . import data, modeling
from .config import add_kd_config, load_config, validate_kd_config
from .distillers import DISTILLER_REGISTRY, Distiller
from .errors import UserError
from .meta_arch import KDMetaArch
from .teacher import Teacher

__version__ = "0.1.0"

__all__ = [
    "DISTILLER_REGISTRY",
    "Distiller",
    "KDMetaArch",
    "Teacher",
    "UserError",
    "add_kd_config",
    "data",
    "load_config",
    "modeling",
    "validate_kd_config",
]
