"""Import of detectors trained with MMDetection, as Detectron2 configs and checkpoints."""

from ..imported import Imported
from .importing import import_detector

__all__ = ["Imported", "import_detector"]
