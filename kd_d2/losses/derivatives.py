"""First derivatives by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward pass of a torch.autograd.Function that cannot be differentiated again.

    Unlike `torch.autograd.function.once_differentiable`, it raises a RuntimeError with `create_graph=True` even if the
    incoming gradient is a constant, where a second derivative would silently lack this function.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            name = type(ctx).__name__.removesuffix("Backward").lstrip("_")
            raise RuntimeError(f"{name} has no second derivative: compute its gradient without create_graph.")
        return backward(ctx, *gradients)

    return wrapper
