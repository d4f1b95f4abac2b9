"""Loss maps: where in the image a distillation loss is large, recorded during a training."""

from .analysis import LossMapAnalysis
from .files import mean_loss_maps, read_saved_examples, save_examples
from .pictures import RunShare, draw_loss_maps, inside_boxes
from .recording import LossMapRecorder, train_with_loss_maps

__all__ = [
    "LossMapAnalysis",
    "LossMapRecorder",
    "RunShare",
    "draw_loss_maps",
    "inside_boxes",
    "mean_loss_maps",
    "read_saved_examples",
    "save_examples",
    "train_with_loss_maps",
]
