"""The processes that read data for a DataLoader."""

from __future__ import annotations

import signal

import torch


def init_worker(worker_id: int) -> None:
    """One thread, and no reaction to signals that ask the training to stop: its own process ends the workers when it ends.

    Of SIGTERM the first one is ignored, which a cluster may send to all processes of a job.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
