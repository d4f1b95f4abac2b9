"""Detection in images and videos of one's own: each with its detections drawn, and all detections as COCO json."""

from .inputs import find_images, find_inputs
from .predict import PredictOptions, predict

__all__ = ["PredictOptions", "find_images", "find_inputs", "predict"]
