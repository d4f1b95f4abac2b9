"""Pure functions on tensors: no config, no Detectron2, nothing of the rest of the project."""

from .normalization import min_max_normalize
from .ssim import ssim_loss

__all__ = ["min_max_normalize", "ssim_loss"]
