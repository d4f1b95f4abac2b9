"""kd_d2: knowledge distillation for object detection on Detectron2.

The names below, and with them Detectron2, are imported on first use; `kd_d2.losses` does not need Detectron2.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from . import moved

__version__ = "0.2.0.dev0"

_MODULES = {
    "DISTILLER_REGISTRY": "distillers",
    "Distiller": "distillers",
    "KDMetaArch": "meta_arch",
    "Predictor": "predictor",
    "Teacher": "teacher",
    "TrainedModel": "analysis.models",
    "UserError": "errors",
    "add_kd_config": "config",
    "load_config": "config",
    "register_config": "config",
    "register_hook": "engine.hooks",
    "validate_kd_config": "config",
}

__all__ = [*_MODULES, "data", "modeling"]

# Warnings of Detectron2's code at every start, which users cannot avoid.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
warnings.filterwarnings("ignore", message=r"torch\.meshgrid")
# Pillow's advice to the program: detectors have no use for transparency.
warnings.filterwarnings("ignore", message="Palette images with Transparency")

moved.explain(__name__)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        if _MODULES[name] == "config":  # building a model from a config needs KDMetaArch registered
            importlib.import_module(".meta_arch", __name__)
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
