"""Error types of detectors: localization, confusion with similar and other classes, background, misses."""

from .analysis import ErrorAnalysis, ModelErrors
from .curves import RECALLS, SIZES, STAGES, ErrorCurves, analyze_errors
from .plots import plot_error_curves, plot_error_shares

__all__ = [
    "RECALLS",
    "SIZES",
    "STAGES",
    "ErrorAnalysis",
    "ErrorCurves",
    "ModelErrors",
    "analyze_errors",
    "plot_error_curves",
    "plot_error_shares",
]
