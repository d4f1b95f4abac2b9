"""Fused SSIM loss on a GPU: one Triton kernel for the loss and its derivatives w.r.t. moments, one for the gradient.

Shape suffixes: N maps (images times channels), H W map. A program computes a tile of ROWS x COLUMNS cells, one column
per thread. It blurs the input lines one by one, along the line, reading taps through the cache, and adds each result,
times the blur matrix's column, to all lines of the tile at once, which stay in registers. Weights are read from blur
matrices, so reflected borders and adjoints need no special handling. Passes over a map (those to blur are read with
ROWS + 2 * RADIUS lines per ROWS): two reads and three writes for the loss, five reads and one write for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gaussian import blur_matrix
from .similarity import EPS, K1, K2, SIGMA

ROWS, COLUMNS = 8, 32
"""Tile of cells that a program computes."""
LAUNCH_OF = {"cuda": {"num_warps": 1, "maxnreg": 128}, "hip": {"num_warps": 1}}
"""Launch options by Triton backend; that of AMD GPUs does not know maxnreg."""
LAUNCH = LAUNCH_OF["hip" if torch.version.hip else "cuda"]


def loss_and_gradient(
    student: Tensor, teacher: Tensor, window_size: int, max_val: float, gradient: Tensor | None
) -> Tensor:
    """Return the mean loss and write the gradient of the sum of SSIM / 4 to `gradient`."""
    B, C, H, W = student.shape
    device = student.device
    rows, columns = (blur_matrix(side, window_size, SIGMA, torch.float32, device) for side in (H, W))
    offset_N = teacher.mean((-2, -1), dtype=torch.float32).flatten()
    grid = (B * C, triton.cdiv(H, ROWS), triton.cdiv(W, COLUMNS))
    sums = torch.empty(grid, dtype=torch.float32, device=device)
    slopes_3NHW = torch.empty((3, B * C, H, W) if gradient is not None else (0,), dtype=torch.float32, device=device)
    sizes: dict[str, Any] = {"C": C, "H": H, "W": W, "RADIUS": window_size // 2, "ROWS": ROWS, "COLUMNS": COLUMNS}
    sizes.update(LAUNCH)  # launch options, passed like kernel arguments
    c1, c2 = (K1 * max_val) ** 2, (K2 * max_val) ** 2
    maps = (student, teacher, *student.stride(), *teacher.stride(), offset_N, rows, columns)
    with torch.cuda.device_of(student):
        _similarity[grid](*maps, slopes_3NHW, sums, c1, c2, EPS, WANTS_SLOPES=gradient is not None, **sizes)
        if gradient is not None:
            _adjoint[grid](*maps, slopes_3NHW, gradient, *gradient.stride(), **sizes)
    return (1 - 4 * sums.double().sum() / student.numel()).float() / 2


@triton.jit
def _map(maps, stride_b, stride_c, n, C):
    """Return the pointer to map n."""
    return maps + (n // C).to(tl.int64) * stride_b + (n % C).to(tl.int64) * stride_c


@triton.jit
def _similarity(
    student, teacher, s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, offset_n, row_matrix, column_matrix, slopes, sums, c1, c2, eps,
    C, H, W, WANTS_SLOPES: tl.constexpr, RADIUS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the sum of q = SSIM / 4 over a tile and its derivatives w.r.t. blurred s, s^2 and s * t."""
    n, i, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    student, teacher = _map(student, s_b, s_c, n, C), _map(teacher, t_b, t_c, n, C)
    offset = tl.load(offset_n + n)
    mean_s = tl.zeros((ROWS, COLUMNS), tl.float32)
    mean_t = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for y in range(max(i * ROWS - RADIUS, 0), min((i + 1) * ROWS + RADIUS, H)):
        line_s = tl.zeros((1, COLUMNS), tl.float32)
        line_t = tl.zeros((1, COLUMNS), tl.float32)
        line_squares = tl.zeros((1, COLUMNS), tl.float32)
        line_product = tl.zeros((1, COLUMNS), tl.float32)
        for tap in tl.static_range(-RADIUS, RADIUS + 1):
            x = column + tap
            is_inside = (x >= 0) & (x < W) & (column < W)
            weight = tl.load(column_matrix + column * W + x, mask=is_inside, other=0.0)
            s = tl.load(student + y * s_h + x * s_w, mask=is_inside, other=0.0).to(tl.float32) - offset
            t = tl.load(teacher + y * t_h + x * t_w, mask=is_inside, other=0.0).to(tl.float32) - offset
            weighted_s, weighted_t = weight * s, weight * t
            line_s += weighted_s
            line_t += weighted_t
            line_squares += weighted_s * s + weighted_t * t
            line_product += weighted_s * t
        weight = tl.load(row_matrix + row * H + y, mask=row < H, other=0.0)
        mean_s += weight * line_s
        mean_t += weight * line_t
        squares += weight * line_squares
        product += weight * line_product

    a, b = mean_s * mean_t, mean_s * mean_s + mean_t * mean_t
    c = (product - a) + c2 / 2
    d = tl.maximum(squares - b, 0.0) + c2
    true_s, true_t = mean_s + offset, mean_t + offset
    a = true_s * true_t + c1 / 2
    b = true_s * true_s + true_t * true_t + c1
    inverse = 1 / (b * d + eps)
    q = a * c * inverse
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
    gradient, g_b, g_c, g_h, g_w, C, H, W, RADIUS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the sum of q in the student's cells of a tile, by blurring the derivatives back."""
    n, i, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    level = tl.num_programs(0).to(tl.int64) * H * W
    by_mean_map = slopes + n.to(tl.int64) * H * W
    by_square_map, by_product_map = by_mean_map + level, by_mean_map + 2 * level
    by_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    by_square = tl.zeros((ROWS, COLUMNS), tl.float32)
    by_product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for y in range(max(i * ROWS - RADIUS, 0), min((i + 1) * ROWS + RADIUS, H)):
        line_mean = tl.zeros((1, COLUMNS), tl.float32)
        line_square = tl.zeros((1, COLUMNS), tl.float32)
        line_product = tl.zeros((1, COLUMNS), tl.float32)
        for tap in tl.static_range(-RADIUS, RADIUS + 1):
            x = column + tap
            is_inside = (x >= 0) & (x < W) & (column < W)
            weight = tl.load(column_matrix + x * W + column, mask=is_inside, other=0.0)
            line_mean += weight * tl.load(by_mean_map + y * W + x, mask=is_inside, other=0.0)
            line_square += weight * tl.load(by_square_map + y * W + x, mask=is_inside, other=0.0)
            line_product += weight * tl.load(by_product_map + y * W + x, mask=is_inside, other=0.0)
        weight = tl.load(row_matrix + y * H + row, mask=row < H, other=0.0)
        by_mean += weight * line_mean
        by_square += weight * line_square
        by_product += weight * line_product

    is_cell = (row < H) & (column < W)
    offset = tl.load(offset_n + n)
    s = tl.load(_map(student, s_b, s_c, n, C) + row * s_h + column * s_w, mask=is_cell, other=0.0).to(tl.float32)
    t = tl.load(_map(teacher, t_b, t_c, n, C) + row * t_h + column * t_w, mask=is_cell, other=0.0).to(tl.float32)
    total = by_mean + 2 * (s - offset) * by_square + (t - offset) * by_product
    place = _map(gradient, g_b, g_c, n, C) + row * g_h + column * g_w
    tl.store(place, total.to(gradient.dtype.element_ty), mask=is_cell)
