"""Modules that were renamed in 0.2; importing an old name raises an error with the new name."""

from __future__ import annotations

import importlib.abc
import sys

MODULES = {
    "comparison": "sweep",
    "data.pseudo_labels": "pseudo_labels",
    "detectors": "adapters",
    "engine.analysed": "analysis.models",
    "engine.gradients": "analysis.gradients",
    "engine.loss_maps": "analysis.loss_maps",
    "engine.loss_normalizers": "engine.rank_states",
    "engine.memory": "engine.hooks",
    "engine.random_state": "random_state",
    "engine.robustness": "analysis.robustness",
    "engine.schedule": "engine.learning_rate",
    "engine.worker_states": "engine.rank_states",
    "evaluation.corruptions": "analysis.robustness",
    "evaluation.drawing": "analysis.drawing",
    "evaluation.error_plots": "analysis.errors",
    "evaluation.error_types": "analysis.errors",
    "evaluation.examples": "analysis.examples",
    "evaluation.feature_plots": "analysis.features",
    "evaluation.features": "analysis.features",
    "evaluation.rank_oracle": "analysis.rank_oracle",
    "evaluation.robustness": "analysis.robustness",
    "evaluation.robustness_plots": "analysis.robustness",
    "labels": "pseudo_labels",
    "torchvision_weights": "checkpoint.torchvision",
    "workers": "distributed",
}


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, package: str):
        self.names = {f"{package}.{old}": f"{package}.{new}" for old, new in MODULES.items()}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in self.names:
            raise ModuleNotFoundError(f"{fullname} is now {self.names[fullname]}", name=fullname)


def explain(package: str) -> None:
    """Make imports of the package's old modules fail with a message that gives the new names."""
    sys.meta_path.append(_Finder(package))
