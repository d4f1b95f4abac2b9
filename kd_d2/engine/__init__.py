"""Training and evaluation: trainer, training step, optimizers and program launch."""

from .launch import launch
from .setup import setup, student_config, write_configs
from .trainer import KDTrainer, evaluate_teacher

__all__ = ["KDTrainer", "evaluate_teacher", "launch", "setup", "student_config", "write_configs"]
