"""Feature maps: correlation of neighbors, distance between student and teacher, and pictures of both."""

from .analysis import FeatureAnalysis, FeatureReader
from .plots import channel_sheet, difference_sheet, plot_neighbors
from .statistics import FeatureStatistics, difference_map, distances, neighbor_correlation

__all__ = [
    "FeatureAnalysis",
    "FeatureReader",
    "FeatureStatistics",
    "channel_sheet",
    "difference_map",
    "difference_sheet",
    "distances",
    "neighbor_correlation",
    "plot_neighbors",
]
