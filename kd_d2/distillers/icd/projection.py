"""A linear projection of all feature levels to one sequence, without first copying the levels together.

Shape suffixes: B images, C channels in, D channels out, H W map, L positions over all levels.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ...losses.derivatives import first_derivative_only


def project_levels(
    maps: list[Tensor],
    weight_DC: Tensor,
    bias_D: Tensor,
    row_terms: list[Tensor] | None = None,
    column_terms: list[Tensor] | None = None,
) -> Tensor:
    """Apply `F.linear` to every position of every level and add terms that depend only on its row or column.

    Args:
        maps: levels (B, C, H, W), any memory format.
        weight_DC, bias_D: as in `torch.nn.Linear`.
        row_terms, column_terms: per level (B, H, D) and (B, W, D), added to each row or column; both or none.

    Returns:
        (B, L, D): concatenated levels, each in row-major order; in the autocast dtype if autocast is enabled.
    """
    terms = [] if row_terms is None else [*row_terms, *column_terms]
    device = maps[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else maps[0].dtype
    maps = [m.to(dtype) for m in maps]
    weight_DC, bias_D, *terms = (t.to(dtype) for t in (weight_DC, bias_D, *terms))
    return _ProjectLevels.apply(len(maps), weight_DC, bias_D, *maps, *terms)


class _ProjectLevels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, num_levels: int, weight_DC: Tensor, bias_D: Tensor, *tensors: Tensor) -> Tensor:
        maps, terms = tensors[:num_levels], tensors[num_levels:]
        rows, columns = terms[:num_levels], terms[num_levels:]
        B, C = maps[0].shape[:2]
        D = len(weight_DC)
        ctx.num_levels, ctx.has_terms = num_levels, bool(terms)
        ctx.save_for_backward(weight_DC, *maps)
        out_BLD = maps[0].new_empty(B, sum(m.shape[2] * m.shape[3] for m in maps), D)
        weight_BCD = weight_DC.T.expand(B, C, D)
        for level, (part, x) in enumerate(zip(_parts(out_BLD, maps), maps, strict=True)):
            if terms:
                torch.add((rows[level] + bias_D)[:, :, None], columns[level][:, None], out=part)
            else:
                part.copy_(bias_D.expand_as(part))
            part.flatten(1, 2).baddbmm_(x.flatten(2).mT, weight_BCD)
        return out_BLD

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        weight_DC, *maps = ctx.saved_tensors
        _, needs_weight, needs_bias, *needs = ctx.needs_input_grad
        B, C = maps[0].shape[:2]
        weight_BCD = weight_DC.T.expand(B, *weight_DC.T.shape)
        weight_grad = torch.zeros_like(weight_DC) if needs_weight else None
        parts = _parts(grad_BLD.contiguous(), maps)
        map_grads, rows, columns = [], [], []
        for level, (part, x) in enumerate(zip(parts, maps, strict=True)):
            flat_BLD = part.flatten(1, 2)
            if needs_weight:
                weight_grad += torch.bmm(flat_BLD.mT, x.flatten(2).mT).sum(0)
            map_grads.append(torch.bmm(weight_BCD, flat_BLD.mT).view_as(x) if needs[level] else None)
            if ctx.has_terms:
                rows.append(part.sum(2))
                columns.append(part.sum(1))
        bias_grad = None
        if needs_bias:
            bias_grad = sum(r.sum((0, 1)) for r in rows) if rows else grad_BLD.sum((0, 1))
        return None, weight_grad, bias_grad, *map_grads, *rows, *columns


def _parts(sequence_BLD: Tensor, maps: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Return the levels of a sequence as views (B, H, W, D)."""
    ends = accumulate((m.shape[2] * m.shape[3] for m in maps), initial=0)
    B, _, D = sequence_BLD.shape
    return [sequence_BLD[:, a:b].view(B, *m.shape[2:], D) for (a, b), m in zip(pairwise(ends), maps, strict=True)]
