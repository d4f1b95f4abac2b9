"""Seconds and memory of a call, for the programs of this folder."""

from __future__ import annotations

import subprocess
import sys
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
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 2**10


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
