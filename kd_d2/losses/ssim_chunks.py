"""Fused SSIM loss in chunks of maps that fit in a CPU's cache.

Shape suffixes: K maps of a chunk, H W map. Work arrays are (H, 4, K, W), with 4 maps to blur: both directions of a blur
are then products with one matrix, along rows of (..., W) and along columns of (H, ...).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .gaussian import blur_matrix, exact_product
from .similarity import EPS, K1, K2, SIGMA

CHUNK_ELEMENTS = {"cpu": 3 * 2**15, "cuda": 2**25}
"""Elements of a map processed at a time, by device."""
BLOCK_SIDE = {"cpu": 32}
"""Lines that a block of a blur matrix computes, so that zeros far from the diagonal are skipped; by device."""


def loss_and_gradient(
    student: Tensor, teacher: Tensor, window_size: int, max_val: float, gradient: Tensor | None
) -> Tensor:
    """Return the mean loss and write the gradient of the sum of SSIM / 4 to `gradient`."""
    if student.is_contiguous() and teacher.is_contiguous():  # chunks may span images
        student, teacher, gradient = (x if x is None else x.flatten(0, 1)[None] for x in (student, teacher, gradient))
    B, C, H, W = student.shape
    dtype, device = torch.promote_types(student.dtype, torch.float32), student.device
    step = min(C, max(1, CHUNK_ELEMENTS.get(device.type, 2**20) // (H * W)))
    blur = SeparableBlur.of(H, W, window_size, dtype, device)
    chunks = {K: _Chunk(blur, K, max_val) for K in {step, C % step or step}}
    offset_BC = teacher.mean((-2, -1), dtype=dtype)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for image in range(B):
        for start in range(0, C, step):
            part = (image, slice(start, start + step))
            maps = student[part].transpose(0, 1), teacher[part].transpose(0, 1)
            out = None if gradient is None else gradient[part].transpose(0, 1)
            total += chunks[maps[0].shape[1]].similarity(*maps, offset_BC[part][:, None], out)
    return ((1 - 4 * total / student.numel()) / 2).to(dtype)


class SeparableBlur(NamedTuple):
    """Matrices that blur the columns and rows of a map, cut into blocks around their diagonals.

    A block is (output lines, input lines, matrix).
    """

    height: int
    width: int
    rows: list[tuple[slice, slice, Tensor]]
    columns: list[tuple[slice, slice, Tensor]]
    rows_adjoint: list[tuple[slice, slice, Tensor]]
    columns_adjoint: list[tuple[slice, slice, Tensor]]

    @classmethod
    def of(cls, height: int, width: int, window_size: int, dtype: torch.dtype, device: torch.device) -> SeparableBlur:
        rows, columns = (blur_matrix(side, window_size, SIGMA, dtype, device) for side in (height, width))
        matrices = (rows, columns, rows.T, columns.T)
        return cls(height, width, *(_blocks(matrix, window_size // 2) for matrix in matrices))


def _blocks(matrix: Tensor, radius: int) -> list[tuple[slice, slice, Tensor]]:
    side = len(matrix)
    count = max(1, round(side / BLOCK_SIDE.get(matrix.device.type, side)))
    edges = [i * side // count for i in range(count + 1)]
    blocks = []
    for start, end in itertools.pairwise(edges):
        read = slice(max(0, start - radius), end + radius)
        blocks.append((slice(start, end), read, matrix[start:end, read]))
    return blocks


class _Chunk:
    """SSIM of K maps at a time, with preallocated work arrays and lists of matrix products."""

    def __init__(self, blur: SeparableBlur, K: int, max_val: float):
        self.c1, self.c2 = (K1 * max_val) ** 2, (K2 * max_val) ** 2
        H, W = blur.height, blur.width
        like = blur.rows[0][2]
        inputs, scratch, moments = torch.empty(3, H, 4, K, W, dtype=like.dtype, device=like.device)
        self.inputs, self.scratch, self.moments = (x.unbind(1) for x in (inputs, scratch, moments))
        self.blurs = [
            *_products_of_rows(blur.columns, inputs, scratch),
            *_products_of_columns(blur.rows, scratch, moments),
        ]
        between, derivatives = (x.view(-1)[: H * 3 * K * W].view(H, 3, K, W) for x in (moments, scratch))
        self.derivatives = derivatives.unbind(1)
        self.adjoint_blurs = [
            *_products_of_columns(blur.rows_adjoint, scratch[:, 1:], between),
            *_products_of_rows(blur.columns_adjoint, between, derivatives),
        ]

    def similarity(self, student: Tensor, teacher: Tensor, offset: Tensor, gradient: Tensor | None) -> Tensor:
        """Return the sum of SSIM / 4 over student and teacher (H, K, W), and write its gradient to `gradient`.

        With a = mu_s * mu_t + C1 / 2, b = mu_s^2 + mu_t^2 + C1, c = covariance + C2 / 2, d = variances + C2 and
        e = b * d + EPS, q = SSIM / 4 = a * c / e. Each map is shifted by its own `offset` (K, 1) first, so that
        variances lose no precision.
        """
        s, t, squares, product = self.inputs
        torch.sub(student.to(s.dtype), offset, out=s)
        torch.sub(teacher.to(s.dtype), offset, out=t)
        torch.mul(s, s, out=squares).addcmul_(t, t)
        torch.mul(s, t, out=product)
        for matrices, out in self.blurs:
            exact_product(*matrices, out=out)

        mean_s, mean_t, d, c = self.moments
        a, b, inverse, q = self.scratch
        torch.mul(mean_s, mean_t, out=a)
        torch.mul(mean_s, mean_s, out=b).addcmul_(mean_t, mean_t)
        c.sub_(a).add_(self.c2 / 2)
        d.sub_(b).clamp_(min=0).add_(self.c2)
        true_s, true_t = torch.add(mean_s, offset, out=inverse), torch.add(mean_t, offset, out=q)
        torch.mul(true_s, true_t, out=a).add_(self.c1 / 2)
        torch.mul(true_s, true_s, out=b).addcmul_(true_t, true_t).add_(self.c1)
        torch.mul(b, d, out=inverse).add_(EPS).reciprocal_()
        torch.mul(a, c, out=q).mul_(inverse)
        total = q.sum()
        if gradient is not None:
            self._gradient(offset, gradient)
        return total

    def _gradient(self, offset: Tensor, gradient: Tensor) -> None:
        """Write the gradient of the sum of q with respect to s. Derivatives of q with respect to the moments of s:

        blurred s * t:  a / e
        blurred s^2:    -q * b / e
        mu_s:           (mu_t * c - mu_t' * a - 2 * q * (mu_s * d - mu_s' * b)) / e, with mu' = mu - offset
        """
        s, t, by_mean, temporary = self.inputs
        mean_s, mean_t, d, c = self.moments
        a, b, inverse, q = self.scratch
        torch.addcmul(c, q, d, value=-2, out=by_mean).mul_(offset)
        by_mean.addcmul_(c.sub_(a), mean_t)
        by_mean.addcmul_(torch.sub(d, b, out=temporary).mul_(mean_s), q, value=-2)
        q.mul_(b).mul_(inverse)
        torch.mul(a, inverse, out=b)
        inverse.mul_(by_mean)
        for matrices, out in self.adjoint_blurs:
            exact_product(*matrices, out=out)
        by_product, by_mean, by_square = self.derivatives
        by_mean.addcmul_(by_product, t)
        if gradient.dtype == by_mean.dtype:
            torch.addcmul(by_mean, by_square, s, value=-2, out=gradient)
        else:
            gradient.copy_(by_mean.addcmul_(by_square, s, value=-2))


Product = tuple[tuple[Tensor, Tensor], Tensor]


def _products_of_columns(blocks: list[tuple[slice, slice, Tensor]], x: Tensor, out: Tensor) -> list[Product]:
    """Return factors and output of the products of a matrix with every column of maps (H, ..., W)."""
    x, out = x.flatten(1), out.flatten(1)
    return [((block, x[read]), out[made]) for made, read, block in blocks]


def _products_of_rows(blocks: list[tuple[slice, slice, Tensor]], x: Tensor, out: Tensor) -> list[Product]:
    """Return factors and output of the products of a matrix with every row of maps (H, ..., W)."""
    x, out = x.flatten(0, -2), out.flatten(0, -2)
    return [((x[:, read], block.T), out[:, made]) for made, read, block in blocks]
