"""Worker processes of DataLoaders."""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch
from torch.utils.data import DataLoader


def configure_workers(loader: DataLoader) -> DataLoader:
    """Set how a loader starts its workers, and return the loader.

    On Linux they are forked, also in Python 3.14, where the default start method is "forkserver": forked workers start
    faster, share the dataset's memory, and are children of this process, as `_init_worker` assumes.
    """
    loader.worker_init_fn = _init_worker
    if loader.num_workers and sys.platform == "linux":
        loader.multiprocessing_context = "fork"
    return loader


def _init_worker(worker_id: int) -> None:
    """Limit a worker to one thread, and ignore the stop signals that a cluster or terminal may send to all processes of a job.

    SIGTERM from the parent process terminates the worker at any time.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
