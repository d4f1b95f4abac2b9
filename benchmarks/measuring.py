"""Measurement of time and memory for the programs in this folder."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable

import torch


def peak_memory(call: Callable[[], object]) -> float:
    """Return the peak memory of a call above the memory before it, in MiB; on a CPU, valid only in a fresh process.

    It is the allocated memory on a GPU, and the resident set size on a CPU.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the call could reuse freed memory
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 2**10


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes, including the work on the device."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def busy_seconds(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes on a GPU, otherwise the CPU seconds of this process, summed over its threads."""
    if torch.cuda.is_available():
        return seconds(call)
    start = time.process_time()
    call()
    return time.process_time() - start


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def number_from_fresh_process(program: str, *arguments: object) -> float:
    """Run a program and return the number in its last line of output."""
    command = [sys.executable, program, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.splitlines()[-1])


def device_name(threads: int) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} threads"
