"""Detector adapters, which expose the intermediate outputs of Detectron2 detectors as plain data."""

from ..modeling.assignment import BACKGROUND, IGNORED, Positives, assign_by_iou
from .adapter import DETECTOR_ADAPTER_REGISTRY, BackboneAdapter, DetectorAdapter, build_adapter
from .dense import (
    AnchorDetectorAdapter,
    ATSSAdapter,
    DenseDetectorAdapter,
    FCOSAdapter,
    FSAFAdapter,
    GFLAdapter,
    RetinaNetAdapter,
    SingleAnchorAdapter,
    labels_and_boxes,
)
from .outputs import (
    CLASSIFIED_PARTS,
    PARTS,
    DensePredictions,
    DetectorOutputs,
    DetectorSpec,
    SampledProposals,
    Towers,
    towers_at,
)
from .rcnn import RCNNAdapter

__all__ = [
    "BACKGROUND",
    "CLASSIFIED_PARTS",
    "DETECTOR_ADAPTER_REGISTRY",
    "IGNORED",
    "PARTS",
    "ATSSAdapter",
    "AnchorDetectorAdapter",
    "BackboneAdapter",
    "DenseDetectorAdapter",
    "DensePredictions",
    "DetectorAdapter",
    "DetectorOutputs",
    "DetectorSpec",
    "FCOSAdapter",
    "FSAFAdapter",
    "GFLAdapter",
    "Positives",
    "RCNNAdapter",
    "RetinaNetAdapter",
    "SampledProposals",
    "SingleAnchorAdapter",
    "Towers",
    "assign_by_iou",
    "build_adapter",
    "labels_and_boxes",
    "towers_at",
]
