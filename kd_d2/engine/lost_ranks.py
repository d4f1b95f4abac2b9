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
ANSWER_SECONDS = 5.0


@functools.lru_cache(1)  # the same error is logged and raised
def explain_lost_ranks(error: BaseException | None) -> str | None:
    """Return a clause that names the unresponsive ranks if a collective has failed, or None for any other error."""
    if comm.get_world_size() == 1 or not isinstance(error, RuntimeError) or not LOST.search(str(error)):
        return None
    silent = ranks_that_are_silent()
    who = f"Rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}" if silent else "Another rank"
    last = re.sub(r"^\[[^]]*\] ", "", str(error).strip().splitlines()[-1])  # drop gloo's source location
    reason = last.partition(". ")[0]
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
