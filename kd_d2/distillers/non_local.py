"""Non-local blocks of several levels, as one matrix per level and image (Wang et al. 2018).

Shape suffixes: S levels, B images, C channels, D inner channels, L positions, I input and O output channels; K = C + 1.
A matrix with I + 1 columns is a linear layer: the last column is its bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..losses.flat_levels import FlatLevels


class NonLocalBlock(nn.Module):
    """Non-local block (dot product): x + W(mean over positions of <theta(x), phi(x')> g(x')).

    W is initialized to zero, so that the block starts as the identity.

    Args:
        channels: channels of the maps.
        dim: channels of theta, phi and g.
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, dim, 1) for _ in range(3))
        self.out = nn.Conv2d(dim, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCL = x_BCHW.flatten(2)
        weight_BCC, bias_BC1 = split(non_local_matrices([self], [x_BCL], FlatLevels.of([x_BCHW]))[0])
        return torch.baddbmm(bias_BC1, weight_BCC, x_BCL).view_as(x_BCHW)


def affine_matrices(layers: Sequence[nn.Conv2d]) -> Tensor:
    """Return weight and bias of 1x1 convolutions of the same size as matrices (S, 1, O, I + 1)."""
    weight_SOI = torch.stack([layer.weight.flatten(1) for layer in layers])
    bias_SO = torch.stack([layer.bias for layer in layers])
    return torch.cat([weight_SOI, bias_SO[:, :, None]], 2)[:, None]


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight (..., O, I) and the bias (..., O, 1) of a matrix (..., O, I + 1)."""
    return matrix[..., :-1], matrix[..., -1:]


def composed(outer_S1OK: Tensor, inner_SBCK: Tensor) -> Tensor:
    """Return the matrices (S, B, O, K) that apply `inner`, then `outer`."""
    weight, bias = split(outer_S1OK)
    return weight @ inner_SBCK + functional.pad(bias, (inner_SBCK.shape[-1] - 1, 0))


def non_local_matrices(blocks: Sequence[NonLocalBlock], maps_BCL: Sequence[Tensor], levels: FlatLevels) -> Tensor:
    """Compute the matrix of each block and image, (S, B, C, K), that gives the block's output for its map.

    Since <theta, phi> g = (g phi^T) theta, and g phi^T follows from the products of all pairs of channels, neither the
    matrix of all pairs of positions nor theta, phi and g of a map are materialized.

    Args:
        blocks: S blocks of the same size.
        maps_BCL: the map of each block.
        levels: their sizes.
    """
    theta_S1DK, phi_S1DK, g_S1DK, out_S1CD = (
        affine_matrices([getattr(block, name) for block in blocks]) for name in ("theta", "phi", "g", "out")
    )
    related_SBDK = (g_S1DK @ _moments(maps_BCL, levels) @ phi_S1DK.transpose(2, 3)) @ theta_S1DK
    channels = out_S1CD.shape[2]
    identity_CK = torch.eye(channels, channels + 1, dtype=related_SBDK.dtype, device=related_SBDK.device)
    return composed(out_S1CD, related_SBDK) + identity_CK


def _moments(maps_BCL: Sequence[Tensor], levels: FlatLevels) -> Tensor:
    """Compute the mean over positions of the products of all pairs of channels, the last a constant 1, (S, B, K, K)."""
    lengths_S111 = levels.lengths_S1[..., None, None]
    products_SBCC = torch.stack([x_BCL @ x_BCL.transpose(1, 2) for x_BCL in maps_BCL]) / lengths_S111
    means_SBC1 = torch.stack([x_BCL.sum(2, keepdim=True) for x_BCL in maps_BCL]) / lengths_S111
    last_SBK1 = functional.pad(means_SBC1, (0, 0, 0, 1), value=1.0)
    return torch.cat([torch.cat([products_SBCC, means_SBC1.transpose(2, 3)], 2), last_SBK1], 3)
