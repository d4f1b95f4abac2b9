"""Weights of an MMDetection checkpoint, moved layer by layer to Detectron2's names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoint import StateDict
from ..checkpoint.torchvision import rename_torchvision_resnet
from ..errors import UserError


class Weights:
    """Moves weights to other names.

    Args:
        source: weights by MMDetection's names; state of losses is left out.

    Attributes:
        moved: weights by Detectron2's names.
    """

    def __init__(self, source: StateDict):
        self._left = {
            name: tensor
            for name, tensor in source.items()
            if not name.endswith("num_batches_tracked") and ".loss_" not in name
        }
        self.moved: StateDict = {}

    def layer(self, name: str, target: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Move the parameters of a layer.

        Args:
            name, target: the layer in MMDetection and in Detectron2.
            change: applied to each parameter.

        Raises:
            UserError: the checkpoint has no such layer, or one of a shape that cannot be changed.
        """
        parameters = [f"{name}.{kind}" for kind in ("weight", "bias") if f"{name}.{kind}" in self._left]
        if not parameters:
            raise UserError(f"The MMDetection checkpoint has no {name}.weight, but its config has this layer.")
        for parameter in parameters:
            tensor = self._left.pop(parameter)
            try:
                self.moved[target + parameter.removeprefix(name)] = change(tensor)
            except RuntimeError as error:
                raise UserError(
                    f"The MMDetection checkpoint does not fit its config: {parameter} is of shape {tuple(tensor.shape)}."
                ) from error

    def tower(self, name: str, target: str, convs: int, norm: str) -> None:
        """Move convolutions that are followed by ReLUs to a sequence of layers.

        Args:
            name, target: the list of modules in MMDetection, and the sequence in Detectron2.
            convs: number of convolutions.
            norm: name of the normalization in Detectron2, "" for none.
        """
        layers = 3 if norm else 2
        for index in range(convs):
            conv = f"{target}.{layers * index}"
            self.layer(f"{name}.{index}.conv", conv)
            if norm:
                self.layer(f"{name}.{index}.{norm.lower()}", f"{target}.{layers * index + 1}")
                # Detectron2's convolutions in front of a normalization have a bias too.
                self.moved.setdefault(f"{conv}.bias", torch.zeros(len(self.moved[f"{conv}.weight"])))

    def resnet(self, name: str, target: str) -> None:
        """Move a ResNet."""
        own = {key: self._left.pop(key) for key in [*self._left] if key.startswith(f"{name}.")}
        stripped = {key.removeprefix(f"{name}."): tensor for key, tensor in own.items()}
        self.moved |= rename_torchvision_resnet(stripped, f"{target}.")

    def scales(self, name: str, target: str, levels: int) -> None:
        """Move the scale of each level to one vector."""
        names = [f"{name}.{level}.scale" for level in range(levels)]
        if missing := [scale for scale in names if scale not in self._left]:
            raise UserError(f"The MMDetection checkpoint has no {missing[0]}.")
        self.moved[target] = torch.stack([self._left.pop(scale).reshape(()) for scale in names])

    def ignore(self, name: str) -> None:
        """Leave out a module, which may not be in the checkpoint."""
        self._left = {key: tensor for key, tensor in self._left.items() if not key.startswith(f"{name}.")}

    def check_all_moved(self) -> None:
        """Raise a UserError if a weight was not moved."""
        if self._left:
            raise UserError(
                f"The MMDetection checkpoint has {len(self._left)} weights for which its config has no layer; the first one is {min(self._left)}."
            )
