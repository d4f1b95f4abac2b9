"""Modules that were renamed in 0.2; importing an old name raises an error with the new name."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable

MODULES = {
    "comparison": "sweep",
    "data.pseudo_labels": "pseudo_labels",
    "detectors": "adapters",
    "engine.analysed": "analysis.models",
    "engine.balance_log": "engine.hooks",
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

NAMES = {
    "checkpoint.inherit": "inheritance.inherit",
    "config.as_overrides": "config_files.as_overrides",
    "config.find_config_file": "config_files.find_config_file",
    "config.read_yaml": "config_files.read_yaml",
    "distillers.base.AdaptationLayers": "distillers.AdaptationLayers",
    "distillers.base.Schedule": "distillers.Schedule",
    "distillers.base.check_number": "errors.check_number",
    "distillers.base.check_same_anchors": "distillers.check_same_anchors",
    "distillers.base.common_strides": "distillers.common_strides",
    "distillers.base.count_of": "distillers.count_of",
    "distillers.base.levels_by_stride": "distillers.matching.levels_by_stride",
    "distributed.mean_count_of_workers": "distributed.mean_count_across_ranks",
    "distributed.mean_of_workers": "distributed.mean_across_ranks",
    "distributed.sum_of_workers": "distributed.sum_across_ranks",
    "losses.channel_moments": "losses.moments.central_moments",
    "losses.pearson_loss_of_moments": "losses.pearson_loss_of_levels",
    "predictor.drawing_paths": "prediction.inputs.drawing_names",
    "predictor.find_images": "prediction.find_images",
    "predictor.predict_images": "prediction.predict",
    "report.comparison_section": "report.sections.sweep_section",
    "report.run_section": "report.sections.run_section",
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


def explain_names(module: str) -> Callable[[str], object]:
    """Return a `__getattr__` of a module with which imports of its old names fail with a message that gives the new ones.

    It raises an ImportError, since `from module import name` replaces the message of an AttributeError.
    """
    package = module.partition(".")[0]

    def getattr_of_module(name: str) -> object:
        old = f"{module}.{name}".removeprefix(f"{package}.")
        if old in NAMES:
            raise ImportError(f"{package}.{old} is now {package}.{NAMES[old]}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_of_module
