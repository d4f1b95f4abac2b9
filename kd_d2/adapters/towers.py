"""Splitting of dense heads with two convolution towers: RetinaNetHead and its subclasses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator

from detectron2.modeling.meta_arch import fcos
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from ..modeling.deformable import DeformableConv
from ..modeling.fcos import FCOSHead
from ..modeling.fsaf import FSAFHead
from ..modeling.gfl import GFLHead

READ_HEADS = {head.forward for head in (RetinaNetHead, fcos.FCOSHead, FCOSHead, GFLHead, FSAFHead)}
"""Forward methods that pass each level to both towers and do not use it otherwise."""
TOWERS = ("cls_subnet", "bbox_subnet")
CONVOLUTIONS = (nn.Conv2d, DeformableConv)


def channels_of_towers(head: nn.Module) -> tuple[int, ...] | None:
    """Return the channels before the first convolution and after each, or None if the head cannot be split."""
    if type(head).forward not in READ_HEADS:
        return None
    towers = [getattr(head, name) for name in TOWERS]
    if not all(map(_can_be_cut, towers)):
        return None
    last = [tower[number - 1] for tower in towers for number in _activations(tower)]
    both = [_channels(tower) for tower in towers]
    return both[0] if both[0] == both[1] and len({*last}) == len(last) else None


def _can_be_cut(tower: nn.Module) -> bool:
    """Return whether the tower is a sequence of convolutions, each followed by a ReLU, with any layers between them."""
    if not isinstance(tower, nn.Sequential):
        return False
    is_convolution = [isinstance(layer, CONVOLUTIONS) for layer in tower if isinstance(layer, (*CONVOLUTIONS, nn.ReLU))]
    return is_convolution == [True, False] * (len(is_convolution) // 2) != []


def _channels(tower: nn.Sequential) -> tuple[int, ...]:
    convolutions = [layer for layer in tower if isinstance(layer, CONVOLUTIONS)]
    return (convolutions[0].in_channels, *(layer.out_channels for layer in convolutions))


def _activations(tower: nn.Sequential) -> list[int]:
    return [number for number, layer in enumerate(tower) if isinstance(layer, nn.ReLU)]


def _cut(tower: nn.Sequential, split: int) -> int:
    """Return the number of tower layers before the activation of convolution `split`; 0 if `split` is 0."""
    return _activations(tower)[split - 1] if split else 0


@contextlib.contextmanager
def recorded(
    head: nn.Module, features: list[Tensor], splits: Iterable[int]
) -> Iterator[dict[int, tuple[list[Tensor], list[Tensor]]]]:
    """Record the class and box tower features of each level, by split, in one forward pass within this context."""
    found: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    with contextlib.ExitStack() as hooks:
        for split in splits:
            found[split] = ([], []) if split else (features, features)
            for name, levels in zip(TOWERS, found[split], strict=True):
                tower = getattr(head, name)
                if split:
                    last = tower[_cut(tower, split) - 1]
                    hooks.enter_context(last.register_forward_hook(lambda _, args, out, to=levels: to.append(out)))
        yield found


def finish(head: nn.Module, split: int, class_features: list[Tensor], box_features: list[Tensor]) -> tuple:
    """Run the rest of the head on features after `split`, and return its outputs by kind and level.

    A shallow copy of the head runs, with each tower replaced by its remaining layers; the head itself is not modified.
    """
    rest = copy.copy(head)
    rest._modules = dict(head._modules)
    for number, name in enumerate(TOWERS):
        tower = getattr(head, name)
        rest._modules[name] = _Rest(tower[_cut(tower, split) :], number)
    return rest(list(zip(class_features, box_features, strict=True)))


class _Rest(nn.Module):
    """The remaining layers of a tower, which take its features from the pair of a level."""

    def __init__(self, layers: nn.Sequential, number: int):
        super().__init__()
        self.layers = layers
        self.number = number

    def forward(self, level: tuple[Tensor, Tensor]) -> Tensor:
        return self.layers(level[self.number])
