"""Gaussian blur of feature maps as matrix products."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

NEGLIGIBLE = 1e-16
"""Weights below it, lost in float64 rounding, are set to zero: some would be denormal in float32 and slow on CPUs."""


def gaussian_blur(maps: Tensor, window_size: int, sigma: float) -> Tensor:
    """Blur maps (..., H, W) with a Gaussian window and reflected borders (kornia's kernel and padding).

    Args:
        window_size: side of the window in cells, odd, at most 2 * min(H, W) - 1.
        sigma: standard deviation in cells.

    Raises:
        ValueError: the window is even or too large.
    """
    rows, columns = (blur_matrix(side, window_size, sigma, maps.dtype, maps.device) for side in maps.shape[-2:])
    return _Blur.apply(maps, rows, columns)


class _Blur(torch.autograd.Function):
    """(maps (..., H, W), rows, columns) -> rows @ maps @ columns.T, with exact products in all derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return exact_product(exact_product(rows, maps), columns.T)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        return _Blur.apply(gradient, rows.T, columns.T), None, None


def exact_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute left @ right without autocast and, in float32, as if `torch.set_float32_matmul_precision` were "highest".

    Variances are small differences of products, which TF32 and bfloat16 lose. No setting is changed, since other
    threads may multiply at the same time: TF32 gets three products of what its 11 bits hold exactly, bfloat16 a product
    in float64.
    """
    device = left.device.type
    with torch.autocast(device, enabled=False):
        precision = _float32_precision(device) if left.dtype is torch.float32 else "ieee"
        if precision == "tf32":
            (left_high, left_low), (right_high, right_low) = _split(left), _split(right)
            product = left_high @ right_low
            product += left_low @ right_high
            product += left_high @ right_high
        elif precision == "bf16":
            product = (left.double() @ right.double()).float()
        else:
            return torch.matmul(left, right, out=out)
        return product if out is None else out.copy_(product)


@torch.compiler.assume_constant_result  # torch.compile cannot trace the settings; it keeps those of the first call
def _float32_precision(device: str) -> str:
    return _FLOAT32[device].fp32_precision if device in _FLOAT32 else "ieee"


_FLOAT32 = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into their nearest TF32 numbers, with 13 bits of the mantissa zero, and the remainders."""
    high = ((x.view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)
    return high, x - high


def blur_matrix(side: int, window_size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the (side, side) matrix that blurs a line with reflected ends; its transpose is the adjoint.

    It is cached, except in modes whose tensors have no use outside, and computed in the graph under `torch.compile`.
    """
    if torch.compiler.is_compiling():
        return _blur_weights(side, window_size, sigma, device).to(dtype)
    build = _cached_blur_matrix if makes_plain_tensors() else _new_blur_matrix
    return build(side, window_size, sigma, dtype, device)


def makes_plain_tensors() -> bool:
    """Return whether new tensors have values, which they do not in modes such as FakeTensorMode."""
    return type(torch.empty(0, device="cpu")) is Tensor


@torch.inference_mode(False)  # the cached matrix may be used in training later
def _new_blur_matrix(side: int, window_size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _blur_weights(side, window_size, sigma, torch.device("cpu")).to(device, dtype)


_cached_blur_matrix = lru_cache(maxsize=512)(_new_blur_matrix)


def _blur_weights(side: int, window_size: int, sigma: float, device: torch.device) -> Tensor:
    """Compute the matrix in float64: the weights of each input and of its reflections in both ends."""
    half, last = window_size // 2, side - 1
    if window_size % 2 == 0 or half > last:
        raise ValueError(f"window_size is {window_size}; for {side} cells it must be odd and at most {2 * last + 1}")

    def weight_at(distance: Tensor) -> Tensor:
        return torch.where(distance.abs() <= half, torch.exp(-(distance / sigma).square() / 2), 0)

    inputs = torch.arange(side, device=device, dtype=torch.float64)
    outputs = inputs[:, None]
    weights = weight_at(outputs - inputs)
    weights += weight_at(outputs + inputs) * (inputs > 0)
    weights += weight_at(2 * last - outputs - inputs) * (inputs < last)
    weights /= weight_at(torch.arange(-half, half + 1, device=device, dtype=torch.float64)).sum()
    return weights.masked_fill(weights < NEGLIGIBLE, 0)
