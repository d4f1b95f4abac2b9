"""Export of detectors to TorchScript, ONNX and OpenVINO files, which run without Detectron2, and their inference."""

from .exporting import ExportOptions, export_detector
from .metadata import ExportMetadata
from .running import ExportedModel, load_exported, load_exported_detector

__all__ = [
    "ExportMetadata",
    "ExportOptions",
    "ExportedModel",
    "export_detector",
    "load_exported",
    "load_exported_detector",
]
