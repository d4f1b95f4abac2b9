"""Import of detectors trained with MMDetection, as Detectron2 configs and checkpoints."""

from .importing import Imported, import_detector

__all__ = ["Imported", "import_detector"]
