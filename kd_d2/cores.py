"""The number of CPU cores that this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = "/sys/fs/cgroup"
MEMBERSHIP = "/proc/self/cgroup"


def available_cores() -> int:
    """Return the number of cores that this process may use: those of its affinity, or fewer if a container limits them."""
    return min([_cores_of_affinity(), *(max(1, math.ceil(quota)) for quota in _quotas())])


def limit_threads() -> None:
    """Set OMP_NUM_THREADS to `available_cores` if a container limits CPU time and the variable is not set.

    It has an effect only before PyTorch is imported. PyTorch itself ignores these limits; with more threads than they allow,
    threads are paused while others wait for them.
    """
    cores = available_cores()
    if cores < _cores_of_affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _cores_of_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas() -> Iterator[float]:
    """Yield the limits in cores that Linux's control groups of this process and their parents have, in version 1 or 2."""
    try:
        lines = Path(MEMBERSHIP).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path(GROUPS, "cpu" if controllers else "")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                with contextlib.suppress(OSError, ValueError):  # no such file, or no limit, which is "max"
                    quota, period = _quota_and_period(folder, version=1 if controllers else 2)
                    if quota > 0:  # -1 is no limit
                        yield quota / period


def _quota_and_period(folder: Path, version: int) -> tuple[int, int]:
    """Return microseconds of CPU time per period, and the period."""
    if version == 1:
        texts = [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
    else:
        texts = (folder / "cpu.max").read_text().split()
    quota, period = map(int, texts)
    return quota, period
