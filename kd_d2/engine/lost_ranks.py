"""Ranks that no longer answer, because they hang or were killed."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time

import torch
from detectron2.utils import comm

LOST = re.compile(r"gloo|NCCL|Connection (reset|closed)|Broken pipe|[Tt]imed? ?out")
"""What torch.distributed says where a rank does not take part in an exchange."""
ANSWER_SECONDS = 5.0


@functools.lru_cache(1)  # the same error is logged and raised
def explain_lost_ranks(error: BaseException | None) -> str | None:
    """Names the ranks that no longer answer, where an exchange between ranks has failed; None for any other error."""
    if comm.get_world_size() == 1 or not isinstance(error, RuntimeError) or not LOST.search(str(error)):
        return None
    silent = ranks_that_are_silent()
    who = f"Rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}" if silent else "Another rank"
    last = re.sub(r"^\[[^]]*\] ", "", str(error).strip().splitlines()[-1])  # without gloo's place in its source
    reason = last.partition(". ")[0]
    return (
        f"{who} no longer answer{'s' * (len(silent) < 2)}, having been killed, out of memory, or without progress for --rank-timeout; rank "
        f"{comm.get_rank()} stops too ({reason[:200]})"
    )


def ranks_that_are_silent() -> list[int]:
    """Those that do not call this function within `ANSWER_SECONDS`; the first rank, which keeps the answers, if none can be had."""
    silent = [0]

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the process that has the store has ended
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"kd_d2/answer/{comm.get_rank()}", "")
            time.sleep(ANSWER_SECONDS)
            silent[:] = [r for r in range(comm.get_world_size()) if not store.check([f"kd_d2/answer/{r}"])]

    thread = threading.Thread(target=ask, daemon=True)  # a store whose process hangs never replies
    thread.start()
    thread.join(2 * ANSWER_SECONDS)
    return silent
