"""ICD, instance-conditional distillation (Kang et al., NeurIPS 2021)."""

from .distiller import ICD

__all__ = ["ICD"]
