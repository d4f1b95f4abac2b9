"""Dataset statistics and problem detection for `kd-d2 data check`."""

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
