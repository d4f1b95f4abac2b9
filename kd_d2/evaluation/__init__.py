"""Evaluators of detections."""

from .build import build_evaluator, check_evaluation

__all__ = ["build_evaluator", "check_evaluation"]
