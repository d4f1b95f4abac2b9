"""Inference on images and videos, with visualizations and COCO JSON output."""

from .inputs import find_images, find_inputs
from .predict import PredictOptions, predict

__all__ = ["PredictOptions", "find_images", "find_inputs", "predict"]
