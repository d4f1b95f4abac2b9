"""Pure functions on tensors: no config, no Detectron2, nothing of the rest of the project."""

from .icd import attended_value_loss, icd_distill_loss, instance_attention
from .normalization import min_max_normalize
from .ssim import ssim_loss

__all__ = ["attended_value_loss", "icd_distill_loss", "instance_attention", "min_max_normalize", "ssim_loss"]
