"""Detectors of other programs as Detectron2 configs and checkpoints."""

from .weights import Weights
from .writing import Imported, check_empty, detectron2_config, write_detector

__all__ = ["Imported", "Weights", "check_empty", "detectron2_config", "write_detector"]
