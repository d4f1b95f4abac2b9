"""Dataset statistics and problem detection for `kd-d2 data check`."""

from .check import DataCheck, check_sets
from .findings import Finding
from .picture import draw_augmented, draw_samples
from .schedule import schedule_of_config
from .sets import DataSet, class_count_of_config, config_to_check, sets_of_config
from .statistics import SetStatistics, measure

__all__ = [
    "DataCheck",
    "DataSet",
    "Finding",
    "SetStatistics",
    "check_sets",
    "class_count_of_config",
    "config_to_check",
    "draw_augmented",
    "draw_samples",
    "measure",
    "schedule_of_config",
    "sets_of_config",
]
