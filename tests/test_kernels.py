"""Triton kernels on a machine without a GPU: compiled resource usage, and results in the interpreter."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ARCHITECTURES = [75, 80, 90, 100]
REGISTERS, STACK = 128, 64
"""Limits per thread: registers, and bytes of stack, which holds spilled registers."""

POINTERS = {"student", "teacher", "gradient"}
FLOAT_POINTERS = {"offset_n", "row_matrix", "column_matrix", "slopes", "sums"}
FLOATS = {"c1", "c2", "eps"}
KERNELS = {"_similarity": {"WANTS_SLOPES": True}, "_adjoint": {}}


def _resources(kernel: str, architecture: int, dtype: str, folder: Path) -> dict[str, int]:
    """Compile a kernel and return its registers and bytes of stack per thread."""
    from kd_d2.losses import ssim_triton

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(ssim_triton, kernel)
    constants = {"RADIUS": 5, "ROWS": ssim_triton.ROWS, "COLUMNS": ssim_triton.COLUMNS, **KERNELS[kernel]}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in POINTERS:
            return f"*{dtype}"
        return "*fp32" if name in FLOAT_POINTERS else "fp32" if name in FLOATS else "i32"

    source = ASTSource(
        fn=function, signature={name: type_of(name) for name in function.arg_names}, constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=ssim_triton.LAUNCH_OF["cuda"])
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    program = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([program, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_keep_to_registers(kernel: str, architecture: int, tmp_path: Path) -> None:
    """Check registers and stack per thread for GPUs from Turing to Blackwell; spills show up as stack."""
    for dtype in ("fp32", "bf16"):
        resources = _resources(kernel, architecture, dtype, tmp_path)
        print(kernel, architecture, dtype, resources)
        assert resources["REG"] <= REGISTERS and resources["STACK"] <= STACK, (dtype, resources)


def test_launch_options_that_the_backends_know() -> None:
    from kd_d2.losses import ssim_triton

    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    backends = {"cuda": CUDABackend(GPUTarget("cuda", 90, 32)), "hip": HIPBackend(GPUTarget("hip", "gfx942", 64))}
    assert ssim_triton.LAUNCH in ssim_triton.LAUNCH_OF.values()
    for name, backend in backends.items():
        launch = ssim_triton.LAUNCH_OF[name]
        assert launch.items() <= vars(backend.parse_options(dict(launch))).items()  # a launch fails with others


TRITON = """
import sys, torch
from kd_d2.losses import ssim_chunks, ssim_triton
torch.manual_seed(0)
for shape, window, offset, dtype, layout in (
    ((1, 1, 17, 10), 11, 0.0, torch.float32, torch.contiguous_format),
    ((2, 2, 7, 10), 13, 100.0, torch.float32, torch.contiguous_format),
    ((1, 2, 9, 34), 5, -3.0, torch.float32, torch.channels_last),
    ((1, 1, 7, 20), 11, 0.0, torch.bfloat16, torch.contiguous_format),
):
    student = (torch.rand(shape) + offset).to(dtype, memory_format=layout)
    teacher = (0.7 * student.float() + 0.3 * (torch.rand(shape) + offset)).to(dtype)
    results = []
    for module in (ssim_triton, ssim_chunks):
        gradient = torch.empty_like(student)
        loss = module.loss_and_gradient(student, teacher, window, 1.0, gradient)
        assert module.loss_and_gradient(student, teacher, window, 1.0, None) == loss
        results.append((loss, gradient))
    (loss, gradient), (expected, reference) = results
    assert abs(loss - expected) < 1e-6, (shape, loss, expected)
    error = (gradient - reference).double().norm() / reference.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), (shape, error)
print("equal")
"""


def test_triton_kernels_on_its_interpreter() -> None:
    """Check the kernels in Triton's CPU interpreter against the chunks for shapes, windows, layouts and dtypes."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.stdout.strip() == "equal", result.stderr
