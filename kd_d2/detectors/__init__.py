"""How Detectron2's detectors are read: adapters, and the plain data that they return."""

from .adapter import DETECTOR_ADAPTER_REGISTRY, BackboneAdapter, DetectorAdapter, build_adapter
from .dense import DenseDetectorAdapter, RetinaNetAdapter
from .outputs import BACKGROUND, IGNORED, DensePredictions, DetectorOutputs, DetectorSpec, Positives
from .rcnn import RCNNAdapter

__all__ = [
    "BACKGROUND",
    "DETECTOR_ADAPTER_REGISTRY",
    "IGNORED",
    "BackboneAdapter",
    "DenseDetectorAdapter",
    "DensePredictions",
    "DetectorAdapter",
    "DetectorOutputs",
    "DetectorSpec",
    "Positives",
    "RCNNAdapter",
    "RetinaNetAdapter",
    "build_adapter",
]
