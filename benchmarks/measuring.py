"""Seconds and memory of a call, for the programs of this folder."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable

import torch


def peak_memory(call: Callable[[], object]) -> float:
    """MiB that the call needs at its peak above what was there before; on a CPU only meaningful in a fresh process.

    On a CPU of the resident set, on a GPU of allocated memory.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be there for the call
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 2**10


def seconds(call: Callable[[], object]) -> float:
    """Of the call, the device's work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def number_from_fresh_process(program: str, *arguments: object) -> float:
    """What the program, started with these arguments, prints last."""
    command = [sys.executable, program, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.splitlines()[-1])


def device_name(threads: int) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} threads"
