"""Detectors and backbones that Detectron2 lacks; importing registers them."""

from .slim_resnet import add_slim_resnet_config

__all__ = ["add_slim_resnet_config"]
