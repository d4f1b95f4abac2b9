"""Detectors of other programs as Detectron2 configs and checkpoints."""

from .weights import Weights, sorted_by_scale
from .writing import Imported, check_empty, detectron2_config, write_detector

__all__ = ["Imported", "Weights", "check_empty", "detectron2_config", "sorted_by_scale", "write_detector"]
