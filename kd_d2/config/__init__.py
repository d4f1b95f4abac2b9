"""Configs: the library's keys, loading of files and overrides, and validation before anything expensive starts."""

from ..config_files import find_file, find_weights
from ..moved import explain_names
from .library_keys import (
    KD_META_ARCH,
    AmpKeys,
    BalanceKeys,
    PseudoLabelKeys,
    SolverKeys,
    add_kd_config,
    declared_nodes,
    detector_of,
    reads_annotations,
    register_config,
)
from .loading import load_config, load_teacher_config
from .reading import changed_keys, check_overrides, read_config, solver_layers, thawed
from .validation import validate_kd_config

__all__ = [
    "KD_META_ARCH",
    "AmpKeys",
    "BalanceKeys",
    "PseudoLabelKeys",
    "SolverKeys",
    "add_kd_config",
    "changed_keys",
    "check_overrides",
    "declared_nodes",
    "detector_of",
    "find_file",
    "find_weights",
    "load_config",
    "load_teacher_config",
    "read_config",
    "reads_annotations",
    "register_config",
    "solver_layers",
    "thawed",
    "validate_kd_config",
]

__getattr__ = explain_names(__name__)
