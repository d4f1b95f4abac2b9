"""Weights of timm's classifiers: downloading, recognition, and filling of a detector's bottom-up network."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from detectron2.utils.file_io import PathHandler, PathManager
from torch import nn

from ..cache import cache_folder
from ..errors import UserError
from ..files import atomic_write
from ..modeling import TimmNetwork
from .fitting import Fit, fill_bottom_up
from .torchvision import StateDict, other_input

logger = logging.getLogger(__name__)

PREFIX = "timm://"


class TimmWeights(PathHandler):
    """Handles paths such as timm://convnext_tiny.fb_in1k by downloading the weights with timm, once."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        import timm

        weights = _pretrained(path)
        name = f"{weights.architecture}.{weights.tag}" if weights.tag else weights.architecture
        file = os.path.join(cache_folder("timm"), f"{name}.pth")
        if force or not os.path.isfile(file):
            logger.info(f"Downloading timm's weights {name} to {file}")
            model = timm.create_model(name, pretrained=True)
            with atomic_write(file, "wb") as output:
                torch.save(model.state_dict(), output)
        return file


PathManager.register_handler(TimmWeights())


def _pretrained(path: str) -> Any:
    """Return timm's description of the weights of a timm:// path; raise a ValueError if there are none."""
    import timm

    name = path.removeprefix(PREFIX)
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError:
        found = None
    if found is None or not found.has_weights:
        known = timm.list_models(f"{name.partition('.')[0]}*", pretrained=True)[:5]
        hint = f"; it has {', '.join(known)}" if known else ""
        raise ValueError(f"timm {timm.__version__} has no weights {name}{hint}")
    return found


def timm_network(model: nn.Module, weights: StateDict) -> str | None:
    """Return the name of a detector's module that is a network of timm with most of the names of the weights, or None."""
    for name, module in model.named_modules():
        if isinstance(module, TimmNetwork):
            own = module.model.state_dict().keys()
            if 2 * len(own & weights.keys()) > min(len(own), len(weights)):
                return name
    return None


def load_timm(model: nn.Module, name: str, weights: StateDict, path: str) -> Fit:
    """Fill a network of timm from weights with timm's names, see `fill_bottom_up`.

    Args:
        model: the detector, modified in place.
        name: name of the network's module.
        weights: weights by timm's names, those of a classifier or of the network.
        path: path of the weights, for messages.

    Raises:
        UserError: no weight fits, or the weights are timm's own and were trained with another input format.
    """
    network = model.get_submodule(name)
    trained = _pretrained(path).to_dict() if path.startswith(PREFIX) else network.model.pretrained_cfg
    needed = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in trained["mean"]],
        "MODEL.PIXEL_STD": [round(255 * value, 3) for value in trained["std"]],
    }
    if other := other_input(model, needed):
        if path.startswith(PREFIX):
            raise UserError(f"{path} needs {other}.")
        logger.warning(f"{path}: most weights of {network.name} need {other}.")
    prefix = f"{name}.model."
    head = trained.get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    offered = {prefix + n: tensor for n, tensor in weights.items() if n.rpartition(".")[0] not in heads}
    return fill_bottom_up(model, offered, prefix, "timm", network.name, path)
