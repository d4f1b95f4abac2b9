"""Evaluators of detections."""

from .build import build_evaluator, check_coco_metrics, check_evaluation, metrics_of

__all__ = ["build_evaluator", "check_coco_metrics", "check_evaluation", "metrics_of"]
