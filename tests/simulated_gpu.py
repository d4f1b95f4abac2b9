"""A simulated GPU: tensors that report a CUDA device, are computed on the CPU, and record host synchronization."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
"""Operators that return a value to the host, or a result whose size depends on values."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
FROM_HOST = {"to", "cuda", "tensor", "as_tensor"}
TO_HOST = {"cpu", "tolist", "numpy", "to"}


class GpuTensor(Tensor):
    """A tensor that reports a GPU device to Python code; its data, and allocations by C++ code, are on the CPU."""

    inner: Tensor
    observer: SimulatedGpu | None = None

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = function in WAITING and kwargs.get("output_size") is None
        if function in INDEXING:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if waits and cls.observer:
            cls.observer.note()
        on_cpu = tree_map_only(GpuTensor, lambda x: x.inner, (args, kwargs))
        results = tree_map_only(Tensor, GpuTensor, function(*on_cpu[0], **on_cpu[1]))
        return return_and_correct_aliasing(function, args, kwargs, results)


class SimulatedGpu(TorchFunctionMode):
    """Context in which the device "cuda" is simulated.

    Attributes:
        places: (file, function) of the innermost frame of kd_d2 wherever the host waited for a value, a size, or a copy
            without non_blocking. Waits in the backward pass are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: set[tuple[str, str]] = set()

    def __enter__(self) -> SimulatedGpu:
        GpuTensor.observer = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        GpuTensor.observer = None
        super().__exit__(*error)

    def note(self) -> None:
        stack = traceback.extract_stack()
        ours = [frame for frame in stack if "/kd_d2/" in frame.filename]
        if ours and not any(frame.name == "_engine_run_backward" for frame in stack):
            self.places.add((Path(ours[-1].filename).name, ours[-1].name))

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        devices = [_device_of(x) for x in (*args[1:], *kwargs.values())]
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if isinstance(source, GpuTensor) and (name in TO_HOST - {"to"} or (name == "to" and CPU in devices)):
            self.note()
            return function(source.inner.detach(), *args[1:], **kwargs)
        if isinstance(source, GpuTensor) and name == "new_tensor":
            self.note()
        if GPU not in devices and name != "cuda":
            return function(*args, **kwargs)
        if name in FROM_HOST and not isinstance(source, GpuTensor) and not kwargs.get("non_blocking"):
            self.note()
        args, kwargs = ([_on_cpu(x) for x in args], {key: _on_cpu(x) for key, x in kwargs.items()})
        return tree_map_only(Tensor, _as_gpu, function(*args, **kwargs) if name != "cuda" else source)


def _device_of(argument: Any) -> torch.device | None:
    """Return the device given as a device, by its name, or as a GpuTensor for `Tensor.to`; None for other arguments."""
    if isinstance(argument, str):
        return {"cuda": GPU, "cuda:0": GPU, "cpu": CPU}.get(argument)
    if isinstance(argument, torch.device):
        return GPU if argument.type == "cuda" else argument
    return GPU if isinstance(argument, GpuTensor) else None


def _on_cpu(argument: Any) -> Any:
    return CPU if not isinstance(argument, Tensor) and _device_of(argument) == GPU else argument


def _as_gpu(tensor: Tensor) -> GpuTensor:
    return tensor if isinstance(tensor, GpuTensor) else GpuTensor(tensor)


def move_to_gpu(module: nn.Module) -> None:
    """Move a module in place, as `module.to("cuda")` does."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(GpuTensor(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = GpuTensor(buffer)
