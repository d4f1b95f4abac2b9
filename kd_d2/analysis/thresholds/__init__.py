"""Score thresholds of detectors: precision, recall and F1 over the threshold, and the confusion of classes."""

from .analysis import ClassThresholds, ModelThresholds, ThresholdAnalysis
from .confusion import confusion_matrix
from .curves import OperatingPoint, ThresholdCurve, measure_thresholds, pooled
from .plots import plot_confusion, plot_threshold_curves

__all__ = [
    "ClassThresholds",
    "ModelThresholds",
    "OperatingPoint",
    "ThresholdAnalysis",
    "ThresholdCurve",
    "confusion_matrix",
    "measure_thresholds",
    "plot_confusion",
    "plot_threshold_curves",
    "pooled",
]
