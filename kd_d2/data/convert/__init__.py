"""Datasets in the formats of other tools, read through globox and written as COCO json."""

from .conversion import Conversion, SplitFile, convert
from .formats import FORMATS
from .source import ConvertOptions

__all__ = ["FORMATS", "Conversion", "ConvertOptions", "SplitFile", "convert"]
