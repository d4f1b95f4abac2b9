"""Weights of another program's checkpoint, moved layer by layer to Detectron2's names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoint import StateDict
from ..errors import UserError

CONSTANTS = ("num_batches_tracked", "relative_position_index")
"""Ends of the names of buffers that a detector has without a checkpoint."""
PARAMETERS = ("weight", "bias", "running_mean", "running_var")


class Weights:
    """Moves weights to other names.

    Args:
        source: weights by the program's names; CONSTANTS and, in MMDetection, state of losses are left out.
        program: name of the program in messages.

    Attributes:
        moved: weights by Detectron2's names.
    """

    def __init__(self, source: StateDict, program: str):
        self._program = program
        self._left = {
            name: tensor for name, tensor in source.items() if not name.endswith(CONSTANTS) and ".loss_" not in name
        }
        self.moved: StateDict = {}

    def layer(self, name: str, target: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Move the parameters, and statistics, of a layer.

        Args:
            name, target: the layer in the program and in Detectron2.
            change: applied to each parameter.

        Raises:
            UserError: the checkpoint has no such layer, or one of a shape that cannot be changed.
        """
        parameters = [f"{name}.{kind}" for kind in PARAMETERS if f"{name}.{kind}" in self._left]
        if not parameters:
            raise UserError(f"The {self._program} checkpoint has no {name}.weight, which the detector needs.")
        for parameter in parameters:
            tensor = self._left.pop(parameter)
            try:
                self.moved[target + parameter.removeprefix(name)] = change(tensor)
            except RuntimeError as error:
                raise UserError(
                    f"The {self._program} checkpoint does not fit the detector: {parameter} is of shape {tuple(tensor.shape)}."
                ) from error

    def tower(self, name: str, target: str, convs: int, norm: str, children: tuple[str, str]) -> None:
        """Move convolutions that are followed by ReLUs to a sequence of layers.

        Args:
            name, target: the list of modules in the program, and the sequence in Detectron2.
            convs: number of convolutions.
            norm: name of the normalization in Detectron2, "" for none.
            children: names of convolution and normalization in each module.
        """
        layers = 3 if norm else 2
        for index in range(convs):
            conv = f"{target}.{layers * index}"
            self.layer(f"{name}.{index}.{children[0]}", conv)
            if norm:
                self.layer(f"{name}.{index}.{children[1]}", f"{target}.{layers * index + 1}")
                # Detectron2's convolutions in front of a normalization have a bias too.
                self.moved.setdefault(f"{conv}.bias", torch.zeros(len(self.moved[f"{conv}.weight"])))

    def conv(self, name: str, target: str, norm: str, children: tuple[str, str]) -> None:
        """Move a convolution, and the normalization after it, from the program's module of both to Detectron2's convolution.

        Args:
            name, target: the module and the convolution.
            norm: name of the normalization in Detectron2, "" for none.
            children: names of convolution and normalization in the module.
        """
        convolution, normalization = children
        self.layer(f"{name}.{convolution}", target)
        if norm:
            self.layer(f"{name}.{normalization}", f"{target}.norm")

    def rename(self, pattern: str, replacement: str) -> None:
        """Replace a regular expression in the names of weights that have not been moved yet."""
        self._left = {re.sub(pattern, replacement, name): tensor for name, tensor in self._left.items()}

    def module(self, name: str, target: str, rename: Callable[[StateDict, str], StateDict]) -> None:
        """Move all weights of a module.

        Args:
            name, target: the module in the program and in Detectron2.
            rename: (weights without the module's name, prefix) -> weights by Detectron2's names after the prefix.
        """
        own = {key: self._left.pop(key) for key in [*self._left] if key.startswith(f"{name}.")}
        self.moved |= rename({key.removeprefix(f"{name}."): tensor for key, tensor in own.items()}, f"{target}.")

    def parameter(self, name: str, target: str) -> None:
        """Move a parameter that is not in a layer."""
        self.moved[target] = self._take(name)

    def _take(self, name: str) -> Tensor:
        tensor = self[name]
        del self._left[name]
        return tensor

    def scales(self, name: str, target: str, levels: int) -> None:
        """Move the scale of each level to one vector."""
        self.moved[target] = torch.stack([self._take(f"{name}.{level}.scale").reshape(()) for level in range(levels)])

    def __contains__(self, name: str) -> bool:
        """Return whether a weight has not been moved yet."""
        return name in self._left

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight that has not been moved yet.

        Raises:
            UserError: there is none.
        """
        if name not in self._left:
            raise UserError(f"The {self._program} checkpoint has no {name}, which the detector needs.")
        return self._left[name]

    def count(self, pattern: str) -> int:
        """Return the number of weights whose names are `pattern` with 0, 1, ... in place of its `{}`."""
        return next(index for index in itertools.count() if pattern.format(index) not in self._left)

    def ignore(self, name: str) -> None:
        """Leave out a module, which may not be in the checkpoint."""
        self._left = {key: tensor for key, tensor in self._left.items() if not key.startswith(f"{name}.")}

    def check_all_moved(self) -> None:
        """Raise a UserError if a weight was not moved."""
        if self._left:
            raise UserError(
                f"The {self._program} checkpoint has {len(self._left)} weights for which the detector has no layer; the first one is {min(self._left)}."
            )


def sorted_by_scale(parameters: Tensor, ratios: int, scales: int) -> Tensor:
    """Reorder outputs per anchor from MMDetection's and torchvision's order (ratio, scale) to Detectron2's (scale, ratio).

    Args:
        parameters: (ratios * scales * n, ...)
        ratios, scales: numbers of them.
    """
    return parameters.unflatten(0, (ratios, scales, -1)).transpose(0, 1).flatten(0, 2)
