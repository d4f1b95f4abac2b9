"""Analyses of trained detectors and distillations, for `kd-d2 analyze` and `kd-d2 report`.

    from kd_d2.analysis import errors, load_models

    models = load_models(["plain=output/plain", "distilled=output/distilled"])
    result = errors.ErrorAnalysis.run(models, "output/errors")
    result.save("output/errors")

Each analysis is a subclass of `Analysis`. `ANALYSES` lists them by name; `register_analysis` adds one. The classes and
functions below are imported on first use, so that listing the analyses is fast.
"""

from __future__ import annotations

import importlib
from typing import Any

from .registry import ANALYSES, find_analysis, register_analysis

_MODULES = {
    "Analysis": "base",
    "load_analysis": "base",
    "Distillation": "models",
    "TrainedModel": "models",
    "load_distillations": "models",
    "load_models": "models",
}

__all__ = [*_MODULES, "ANALYSES", "find_analysis", "register_analysis"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
