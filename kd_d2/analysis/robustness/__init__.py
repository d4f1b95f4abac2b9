"""Robustness to image corruptions: noise, blur, weather, and digital artifacts."""

from .analysis import RobustnessAnalysis
from .corruptions import CORRUPTIONS, SEVERITIES, corrupt
from .measure import measure_robustness
from .metrics import Robustness
from .plots import corruption_sheet, plot_robustness

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "Robustness",
    "RobustnessAnalysis",
    "corrupt",
    "corruption_sheet",
    "measure_robustness",
    "plot_robustness",
]
