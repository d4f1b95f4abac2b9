"""Checkpoints: student-only files, safe loading, and weights of torchvision's and timm's classifiers."""

from ..moved import explain_names
from .checkpointer import CLASS_NAMES, KDCheckpointer, checkpoint_files, copy_to_cpu, load_complete
from .fitting import Fit, fill, load_torchvision
from .reading import UnreadableCheckpointError, check_readable, distiller_states, local_path, read_checkpoint
from .torchvision import StateDict

__all__ = [
    "CLASS_NAMES",
    "Fit",
    "KDCheckpointer",
    "StateDict",
    "UnreadableCheckpointError",
    "check_readable",
    "checkpoint_files",
    "copy_to_cpu",
    "distiller_states",
    "fill",
    "load_complete",
    "load_torchvision",
    "local_path",
    "read_checkpoint",
]

__getattr__ = explain_names(__name__)
