"""Conversion of datasets in the formats of other tools to COCO JSON, with globox."""

from .conversion import Conversion, SplitFile, convert
from .formats import FORMATS
from .source import ConvertOptions

__all__ = ["FORMATS", "Conversion", "ConvertOptions", "SplitFile", "convert"]
