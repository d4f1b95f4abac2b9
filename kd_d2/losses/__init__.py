"""Pure functions on tensors, independent of configs, Detectron2 and the rest of the library."""

from ..moved import explain_names
from .alignment import with_statistics_of
from .attention import channel_attention, mean_activation, own_attention, shared_attention, spatial_attention
from .channel_wise import channel_wise_loss
from .correlation import dist_loss, dist_loss_of_levels
from .divergence import decoupled_loss, softmax_divergence
from .focal import attended_error, background_weights, foreground_weights
from .frequency import detail_loss, haar_transform, inverse_haar_transform
from .hierarchical import hierarchical_context_loss
from .icd import attended_value_loss, icd_distill_loss, instance_attention
from .masked import mask_overlap, masked_imitation_loss
from .normalization import min_max_normalize
from .pearson import pearson_loss, pearson_loss_of_levels
from .prediction_guided import (
    masked_squared_error,
    prediction_difference,
    prediction_guided_loss,
    relative_to_mean,
    weighted_imitation_loss,
)
from .quality_focal import quality_focal_loss
from .rank import count_ranked, rank_kl_loss, reordered
from .richness import feature_richness
from .soft_label import soft_label_loss
from .ssim import fitting_window, ms_ssim_loss, ssim_loss
from .standardization import agreement, standardize

__all__ = [
    "agreement",
    "attended_error",
    "attended_value_loss",
    "background_weights",
    "channel_attention",
    "channel_wise_loss",
    "count_ranked",
    "decoupled_loss",
    "detail_loss",
    "dist_loss",
    "dist_loss_of_levels",
    "feature_richness",
    "fitting_window",
    "foreground_weights",
    "haar_transform",
    "hierarchical_context_loss",
    "icd_distill_loss",
    "instance_attention",
    "inverse_haar_transform",
    "mask_overlap",
    "masked_imitation_loss",
    "masked_squared_error",
    "mean_activation",
    "min_max_normalize",
    "ms_ssim_loss",
    "own_attention",
    "pearson_loss",
    "pearson_loss_of_levels",
    "prediction_difference",
    "prediction_guided_loss",
    "quality_focal_loss",
    "rank_kl_loss",
    "relative_to_mean",
    "reordered",
    "shared_attention",
    "soft_label_loss",
    "softmax_divergence",
    "spatial_attention",
    "ssim_loss",
    "standardize",
    "weighted_imitation_loss",
    "with_statistics_of",
]

__getattr__ = explain_names(__name__)
