"""Weight selection: weights of a narrower model from those of a wider one (Xu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

Sizes = tuple[int, int]
"""Sizes of a dimension in the narrower and in the wider model."""


def evenly_spaced(n: int, N: int, device: torch.device | None = None) -> Tensor:
    """Return the indices of n of N channels, (n,): the integer parts of 0, N / n, 2 N / n, ..."""
    return torch.arange(n, device=device) * N // n


def select_weights(narrow: StateDict, wide: StateDict) -> StateDict:
    """Reduce the tensors of a wider model to the shapes of a narrower one, as far as only numbers of channels differ.

    Of N channels, n are selected with even spacing, the same ones in all layers that share these numbers
    (Xu et al. 2024, "Initializing Models with Larger Ones", https://arxiv.org/abs/2311.18823). Sizes are numbers of channels if
    they are those of outputs of one layer and inputs of another. Other outputs, such as those of other classes, and kernel sizes are not
    reduced.

    Args:
        narrow, wide: state dicts, in which layers correspond by name.

    Returns:
        The tensors of `wide`; those that cannot be reduced to the shape in `narrow` are unchanged.
    """
    channels = _channels(narrow, wide)
    return {
        name: tensor if name not in narrow else _select(tensor, narrow[name].shape, channels)
        for name, tensor in wide.items()
    }


def _channels(narrow: StateDict, wide: StateDict) -> set[Sizes]:
    """Return the different sizes of outputs that other layers read, as they are or flattened."""
    layers = [
        [*zip(tensor.shape, wide[name].shape, strict=True)]
        for name, tensor in narrow.items()
        if name in wide and tensor.dim() == wide[name].dim() > 1
    ]
    outputs = {sizes[0] for sizes in layers}
    inputs = {(sizes[1], len(sizes)) for sizes in layers}
    return {out for out in outputs if out[0] < out[1] and any(_cells(*read, out) for read in inputs)}


def _cells(read: Sizes, dimensions: int, out: Sizes) -> int:
    """Return how many inputs a layer has for each channel, more than 1 if it reads flattened maps, as only linear layers do.

    Args:
        read: numbers of inputs.
        dimensions: number of dimensions of the layer's weight.
        out: numbers of channels.

    Returns:
        0 if the numbers do not correspond.
    """
    cells = read[0] // out[0]
    corresponds = read == (cells * out[0], cells * out[1]) and (cells == 1 or dimensions == 2)
    return cells if corresponds else 0


def _select(offered: Tensor, wanted: torch.Size, channels: set[Sizes]) -> Tensor:
    if offered.dim() != len(wanted):
        return offered
    selected = offered
    for dimension, sizes in enumerate(zip(wanted, offered.shape, strict=True)):
        if sizes[0] == sizes[1]:
            continue
        # A layer may read flattened maps, channel by channel.
        cells = min((c for out in channels if (c := _cells(sizes, len(wanted), out))), default=0)
        if not cells or dimension > 1 or (dimension == 0 and cells > 1):
            return offered
        n, N = (size // cells for size in sizes)
        kept = evenly_spaced(n, N, offered.device)
        selected = (
            selected.unflatten(dimension, (N, cells)).index_select(dimension, kept).flatten(dimension, dimension + 1)
        )
    return selected
