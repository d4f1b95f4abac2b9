"""Comparing methods: a matrix of cells and seeds, run resumably, in one table with plots."""

from .matrix import Cell, Matrix, read_matrix
from .report import compare

__all__ = ["Cell", "Matrix", "compare", "read_matrix"]
