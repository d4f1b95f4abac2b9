"""Comparing methods: a matrix of cells and seeds, run resumably, in one table with plots."""

from .matrix import Cell, Matrix, read_matrix
from .report import SweepOptions, run_sweep

__all__ = ["Cell", "Matrix", "SweepOptions", "read_matrix", "run_sweep"]
