"""Initialization of DataLoader worker processes."""

from __future__ import annotations

import os
import signal
import threading

import torch


def init_worker(worker_id: int) -> None:
    """Limit a worker to one thread, and ignore the stop signals that a cluster may send to all processes of a job.

    SIGTERM from the parent process terminates the worker at any time.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
