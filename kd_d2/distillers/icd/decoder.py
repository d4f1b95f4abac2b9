"""Conditional decoder, in which instance queries attend to the teacher's features (ICD's G).

Shape suffixes: B images, Q queries, M heads, L positions over all levels, D dims of a head, E dims of the decoder, C
channels of the features, H W map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...losses import instance_attention
from .encoding import linear, sine_waves
from .geometry import LevelGeometry
from .projection import project_levels

LOGIT_ELEMENTS = {"cpu": 2**22}
"""Attention logits in memory at a time, by device."""
STORED_ATTENTION = {"cuda": 2**27}
"""Maximum number of attention weights that are stored for the backward pass, by device. PyTorch's fused attention stores
none, but its backward pass took half of ICD's time on a GPU."""


@dataclass
class Attended:
    """Output of a decoder layer.

    Attributes:
        instances: (B, Q, E) updated queries.
        values: (B, M, L, D) the teacher's values.
        attention: (B, M, L) attention summed over the real queries, without gradient.
    """

    instances: Tensor
    values: Tensor
    attention: Tensor


class DecoderLayer(nn.Module):
    """Multi-head cross-attention from queries to positions, followed by a feed-forward block, post-norm.

    Args:
        dim: E.
        num_heads: M.
        ffn_dim: inner width of the feed-forward block.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = linear(dim, dim)
        self.key = linear(dim, dim)
        self.value = linear(dim, dim)
        self.out = linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(linear(dim, ffn_dim), nn.ReLU(), linear(ffn_dim, dim))
        self.norm2 = nn.LayerNorm(dim)

    def heads(self, x_BLE: Tensor) -> Tensor:
        """Reshape (B, L, E) to (B, M, L, D)."""
        return x_BLE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, query_BQE: Tensor, keys: Tensor, values: Tensor, is_valid_BL: Tensor | None) -> Tensor:
        """
        Args:
            query_BQE: (B, Q, E).
            keys, values: (B, M, L, D).
            is_valid_BL: false at padding; None without padding.

        Returns:
            (B, Q, E).
        """
        found = self.attend(query_BQE, keys, values, is_valid_BL)
        query_BQE = self.norm1(query_BQE + self.out(found.transpose(1, 2).flatten(2)))
        return self.norm2(query_BQE + self.ffn(query_BQE))

    def attend(self, query_BQE: Tensor, keys: Tensor, values: Tensor, is_valid_BL: Tensor | None) -> Tensor:
        """Return the means (B, M, Q, D) of the values, weighted by attention. Arguments as in `forward`."""
        Q = query_BQE.shape[1]
        if Q * keys.shape[:3].numel() <= STORED_ATTENTION.get(keys.device.type, 0):
            attention = self.logits(query_BQE, keys, is_valid_BL).softmax(-1)
            return torch.stack([weights @ v for weights, v in zip(attention, values, strict=True)])
        mask = None if is_valid_BL is None else is_valid_BL[:, None, None].expand(-1, -1, Q, -1)
        return F.scaled_dot_product_attention(self.heads(self.query(query_BQE)), keys, values, mask)

    def logits(self, query_BQE: Tensor, keys: Tensor, is_valid_BL: Tensor | None) -> Tensor:
        """Return attention logits (B, M, Q, L), -inf at padding. Arguments as in `forward`."""
        queries = self.heads(self.query(query_BQE)) / keys.shape[-1] ** 0.5
        # Image by image: heads of one image have a constant stride in memory, so that keys are not copied.
        logits = torch.stack([q @ k.mT for q, k in zip(queries, keys, strict=True)])
        return logits if is_valid_BL is None else logits.masked_fill(~is_valid_BL[:, None, None], -torch.inf)

    @torch.no_grad()
    def summed_attention(
        self, query_BQE: Tensor, is_real_BQ: Tensor, keys: Tensor, is_valid_BL: Tensor | None
    ) -> Tensor:
        """Return attention (B, M, L) summed over the real queries, a few at a time. Arguments as in `forward`."""
        B, M, L, _ = keys.shape
        total_BML = keys.new_zeros(B, M, L, dtype=torch.float32)
        step = max(1, LOGIT_ELEMENTS.get(keys.device.type, 2**25) // (B * M * L))
        for queries, is_real in zip(query_BQE.split(step, 1), is_real_BQ.split(step, 1), strict=True):
            total_BML += instance_attention(self.logits(queries, keys, is_valid_BL), is_real)
        return total_BML


class Decoder(nn.Module):
    """ICD's G: layers of cross-attention over the teacher's features, with positions added only to the keys.

    Args:
        channels: C of the teacher's features, which are projected if C differs from `dim`.
        dim: E, a multiple of 4 and of `num_heads`.
        num_heads: M.
        ffn_dim: inner width of the feed-forward blocks.
        num_layers: number of layers, each with its own attention, values and loss.
    """

    def __init__(self, channels: int, dim: int, num_heads: int, ffn_dim: int, num_layers: int):
        super().__init__()
        self.dim = dim
        self.input = linear(channels, dim) if channels != dim else None
        self.position = linear(dim, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, ffn_dim) for _ in range(num_layers))

    def keys(self, layer: DecoderLayer, maps: list[Tensor], geometry: LevelGeometry) -> Tensor:
        """Compute the layer's keys (B, M, L, D): projected features and positions.

        All linear maps along the way are multiplied together first, so that each position is projected once; the row
        and column parts of the position embedding are projected separately.
        """
        with torch.autocast(maps[0].device.type, enabled=False):
            weight, bias = self._behind_input(layer.key)
            bias = bias + layer.key.weight @ self.position.bias
            of_row, of_column = (layer.key.weight @ self.position.weight).chunk(2, 1)
            rows, columns = (
                sine_waves(positions, self.dim // 4).flatten(-2).to(weights) @ weights.T
                for positions, weights in ((geometry.rows, of_row), (geometry.columns, of_column))
            )
            rows, columns = geometry.by_level(rows, columns)
        return layer.heads(project_levels(maps, weight, bias, rows, columns))

    def values(self, layer: DecoderLayer, maps: list[Tensor]) -> Tensor:
        """Compute the layer's values (B, M, L, D) from the teacher's features."""
        return layer.heads(project_levels(maps, *self.value_projection(layer)))

    def value_projection(self, layer: DecoderLayer) -> tuple[Tensor, Tensor]:
        """Return weight (E, C) and bias of the map from the teacher's features to the layer's values."""
        return self._behind_input(layer.value)

    def _behind_input(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the composition of the input projection and `layer`."""
        if self.input is None:
            return layer.weight, layer.bias
        return layer.weight @ self.input.weight, layer.weight @ self.input.bias + layer.bias

    def forward(
        self, query_BQE: Tensor, is_real_BN: Tensor, maps: list[Tensor], geometry: LevelGeometry
    ) -> list[Attended]:
        """
        Args:
            query_BQE: (B, Q, E) encoded instances.
            is_real_BN: whether each of the first N queries is from the ground truth; later ones are not.
            maps: levels (B, C, H, W).
            geometry: geometry of the same levels.

        Returns:
            output of each layer.
        """
        found = []
        for layer in self.layers:
            keys, values = self.keys(layer, maps, geometry), self.values(layer, maps)
            first_BNE = query_BQE[:, : is_real_BN.shape[1]]
            # Before the attention, which has no gradient: older versions of torch reuse its autocast weights without one.
            query_BQE = layer(query_BQE, keys, values, geometry.is_valid)
            attention = layer.summed_attention(first_BNE, is_real_BN, keys, geometry.is_valid)
            found.append(Attended(query_BQE, values, attention))
        return found

    def attention_logits(self, query_BQE: Tensor, maps: list[Tensor], geometry: LevelGeometry) -> list[Tensor]:
        """Return attention logits (B, M, Q, L) by layer for inspection, -inf at padding. Arguments as in `forward`."""
        logits = []
        for layer in self.layers:
            keys, values = self.keys(layer, maps, geometry), self.values(layer, maps)
            logits.append(layer.logits(query_BQE, keys, geometry.is_valid))
            query_BQE = layer(query_BQE, keys, values, geometry.is_valid)
        return logits
