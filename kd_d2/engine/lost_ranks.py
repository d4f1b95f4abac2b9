"""Detection of ranks that no longer respond because they hang or were killed."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time

import torch
from detectron2.utils import comm

LOST = re.compile(r"gloo|NCCL|Connection (reset|closed)|Broken pipe|[Tt]imed? ?out")
"""Matches torch.distributed's error messages when a rank does not take part in a collective."""
NCCL_FAILED = re.compile(r"ncclUnhandled|ncclSystemError|ncclInvalidUsage|ncclInternalError")
"""Matches NCCL's errors that also occur while all ranks are alive."""
ANSWER_SECONDS = 5.0


@functools.lru_cache(1)  # the same error is logged and raised
def explain_lost_ranks(error: BaseException | None) -> str | None:
    """Return a clause that names the unresponsive ranks, or NCCL's error, if a collective has failed, else None."""
    if comm.get_world_size() == 1 or not isinstance(error, RuntimeError) or not LOST.search(str(error)):
        return None
    silent = ranks_that_are_silent()
    last = str(error).strip().removesuffix("Last error:").rstrip().splitlines()[-1]
    last = re.sub(r"^\[[^]]*\] ", "", last)  # drop gloo's source location
    reason = re.split(r"\. (?=[A-Z])", last)[0].rstrip(".")
    if not silent and NCCL_FAILED.search(str(error)):
        return (
            f"NCCL failed on rank {comm.get_rank()} ({reason[:200]}): give the container more /dev/shm, free memory on the "
            "GPU, or see the log that NCCL writes with NCCL_DEBUG=INFO"
        )
    who = f"Rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}" if silent else "Another rank"
    return (
        f"{who} no longer respond{'s' * (len(silent) < 2)} (killed, out of memory, or no progress within --rank-timeout); rank "
        f"{comm.get_rank()} stops too ({reason[:200]})"
    )


def ranks_that_are_silent() -> list[int]:
    """Return the ranks that do not call this function within `ANSWER_SECONDS`; [0] if rank 0's store is unreachable."""
    silent = [0]

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the process that hosts the store has exited
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"kd_d2/answer/{comm.get_rank()}", "")
            time.sleep(ANSWER_SECONDS)
            silent[:] = [r for r in range(comm.get_world_size()) if not store.check([f"kd_d2/answer/{r}"])]

    thread = threading.Thread(target=ask, daemon=True)  # a store hosted by a hung process never replies
    thread.start()
    thread.join(2 * ANSWER_SECONDS)
    return silent
