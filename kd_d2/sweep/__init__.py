"""Comparison of methods: a resumable run of a matrix of cells and seeds, summarized in a table and plots."""

from .matrix import Cell, Matrix, read_matrix
from .report import SweepOptions, run_sweep

__all__ = ["Cell", "Matrix", "SweepOptions", "read_matrix", "run_sweep"]
