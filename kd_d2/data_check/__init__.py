"""What `kd-d2 data check` measures of datasets, and what it finds in them that stops, falsifies or harms a training."""

from .check import DataCheck, check_sets
from .findings import Finding
from .picture import draw_samples
from .sets import DataSet, sets_of_config
from .statistics import SetStatistics, measure

__all__ = [
    "DataCheck",
    "DataSet",
    "Finding",
    "SetStatistics",
    "check_sets",
    "draw_samples",
    "measure",
    "sets_of_config",
]
