"""The fused SSIM loss on a GPU: two Triton kernels, one to the loss and its slopes in the moments, one back to the student.

Shape suffixes: N maps (images times channels), H W map. A program makes one tile of a map; a blur is the tile's part of the
blur matrices of rows and columns times what they read, so reflected borders and adjoints need nothing of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gaussian import blur_matrix
from .similarity import EPS, K1, K2, SIGMA

TILE = 32
"""Side of the cells that a program makes."""


def loss_and_gradient(
    student: Tensor, teacher: Tensor, window_size: int, max_val: float, gradient: Tensor | None
) -> Tensor:
    """The mean loss; the gradient of the sum of SSIM / 4 goes to `gradient`."""
    B, C, H, W = student.shape
    device, radius = student.device, window_size // 2
    rows, columns = (blur_matrix(side, window_size, SIGMA, torch.float32, device) for side in (H, W))
    offset_N = teacher.mean((-2, -1), dtype=torch.float32).flatten()
    grid = (B * C, triton.cdiv(H, TILE), triton.cdiv(W, TILE))
    sums = torch.empty(grid, dtype=torch.float32, device=device)
    slopes_3NHW = torch.empty((3, B * C, H, W) if gradient is not None else (0,), dtype=torch.float32, device=device)
    read = triton.next_power_of_2(TILE + 2 * radius)
    sizes = {"C": C, "H": H, "W": W, "RADIUS": radius, "TILE": TILE, "READ": read}
    c1, c2 = (K1 * max_val) ** 2, (K2 * max_val) ** 2
    maps = (student, teacher, *student.stride(), *teacher.stride(), offset_N, rows, columns)
    with torch.cuda.device_of(student):
        _similarity[grid](*maps, slopes_3NHW, sums, c1, c2, EPS, WANTS_SLOPES=gradient is not None, **sizes)
        if gradient is not None:
            _adjoint[grid](*maps, slopes_3NHW, gradient, *gradient.stride(), **sizes)
    return (1 - 4 * sums.double().sum() / student.numel()).float() / 2


@triton.jit
def _load(maps, stride_b, stride_c, stride_h, stride_w, n, y, x, is_inside, C):
    """The cells (y, x) of map n in float32, 0 outside."""
    start = maps + (n // C).to(tl.int64) * stride_b + (n % C).to(tl.int64) * stride_c
    return tl.load(start + y * stride_h + x * stride_w, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _band(matrix, made, read, side, TRANSPOSED: tl.constexpr):
    """The part (made, read) of a blur matrix, or of its transpose: 0 outside."""
    is_inside = (made < side) & (read >= 0) & (read < side)
    place = read * side + made if TRANSPOSED else made * side + read
    return tl.load(matrix + place, mask=is_inside, other=0.0)


@triton.jit
def _blur(x, rows, columns):
    """rows (TILE, READ) times x (READ, READ) times the transpose of columns (TILE, READ)."""
    return tl.dot(tl.dot(rows, x, input_precision="ieee"), tl.trans(columns), input_precision="ieee")


@triton.jit
def _similarity(
    student, teacher, s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, offset_n, row_matrix, column_matrix, slopes, sums, c1, c2, eps,
    C, H, W, WANTS_SLOPES: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """The sum of q = SSIM / 4 over a tile, and the slopes of q in the blurred s, s^2 and s * t; see `ssim_chunks`."""
    n, i, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    made, read = tl.arange(0, TILE), tl.arange(0, READ) - RADIUS
    y, x = (i * TILE + read)[:, None], (j * TILE + read)[None, :]
    is_inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    offset = tl.load(offset_n + n)
    s = tl.where(is_inside, _load(student, s_b, s_c, s_h, s_w, n, y, x, is_inside, C) - offset, 0.0)
    t = tl.where(is_inside, _load(teacher, t_b, t_c, t_h, t_w, n, y, x, is_inside, C) - offset, 0.0)
    rows = _band(row_matrix, (i * TILE + made)[:, None], (i * TILE + read)[None, :], H, False)
    columns = _band(column_matrix, (j * TILE + made)[:, None], (j * TILE + read)[None, :], W, False)
    mean_s, mean_t = _blur(s, rows, columns), _blur(t, rows, columns)
    squares, product = _blur(s * s + t * t, rows, columns), _blur(s * t, rows, columns)

    a, b = mean_s * mean_t, mean_s * mean_s + mean_t * mean_t
    c = (product - a) + c2 / 2
    d = tl.maximum(squares - b, 0.0) + c2
    true_s, true_t = mean_s + offset, mean_t + offset
    a = true_s * true_t + c1 / 2
    b = true_s * true_s + true_t * true_t + c1
    inverse = 1 / (b * d + eps)
    q = a * c * inverse
    row, column = (i * TILE + made)[:, None], (j * TILE + made)[None, :]
    is_cell = (row < H) & (column < W)
    program = (n * tl.num_programs(1) + i) * tl.num_programs(2) + j
    tl.store(sums + program, tl.sum(tl.where(is_cell, q, 0.0)))
    if WANTS_SLOPES:
        by_mean = (offset * (c - 2 * q * d) + mean_t * (c - a) - 2 * q * mean_s * (d - b)) * inverse
        place = slopes + (n.to(tl.int64) * H + row) * W + column
        level = tl.num_programs(0).to(tl.int64) * H * W
        tl.store(place, by_mean, mask=is_cell)
        tl.store(place + level, -q * b * inverse, mask=is_cell)
        tl.store(place + 2 * level, a * inverse, mask=is_cell)


@triton.jit
def _adjoint(
    student, teacher, s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, offset_n, row_matrix, column_matrix, slopes,
    gradient, g_b, g_c, g_h, g_w, C, H, W, RADIUS: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum of q in the student's cells of a tile: the slopes, blurred back."""
    n, i, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    made, read = tl.arange(0, TILE), tl.arange(0, READ) - RADIUS
    y, x = (i * TILE + read)[:, None], (j * TILE + read)[None, :]
    is_inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    rows = _band(row_matrix, (i * TILE + made)[:, None], (i * TILE + read)[None, :], H, True)
    columns = _band(column_matrix, (j * TILE + made)[:, None], (j * TILE + read)[None, :], W, True)
    place = slopes + (n.to(tl.int64) * H + y) * W + x
    level = tl.num_programs(0).to(tl.int64) * H * W
    by_mean = _blur(tl.load(place, mask=is_inside, other=0.0), rows, columns)
    by_square = _blur(tl.load(place + level, mask=is_inside, other=0.0), rows, columns)
    by_product = _blur(tl.load(place + 2 * level, mask=is_inside, other=0.0), rows, columns)

    row, column = (i * TILE + made)[:, None], (j * TILE + made)[None, :]
    is_cell = (row < H) & (column < W)
    offset = tl.load(offset_n + n)
    s = _load(student, s_b, s_c, s_h, s_w, n, row, column, is_cell, C) - offset
    t = _load(teacher, t_b, t_c, t_h, t_w, n, row, column, is_cell, C) - offset
    start = gradient + (n // C).to(tl.int64) * g_b + (n % C).to(tl.int64) * g_c
    total = by_mean + 2 * s * by_square + t * by_product
    tl.store(start + row * g_h + column * g_w, total.to(gradient.dtype.element_ty), mask=is_cell)
