"""Worker processes of DataLoaders."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
from multiprocessing.connection import Listener
from multiprocessing.queues import Queue

import torch
from torch.utils.data import DataLoader

from ..errors import UserError

MOST_OPEN_FILES = 65536


def configure_workers(loader: DataLoader) -> DataLoader:
    """Set how a loader starts its workers, and return the loader.

    On Linux they are forked, also in Python 3.14, where the default start method is "forkserver": forked workers start
    faster, share the dataset's memory, and are children of this process, as `_init_worker` assumes.

    Raises:
        UserError: there are workers, and the machine does not allow the sockets or semaphores by which they send images.
    """
    loader.worker_init_fn = _init_worker
    if loader.num_workers and sys.platform == "linux":
        loader.multiprocessing_context = "fork"
    if loader.num_workers and torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
        _check_sockets()
        _check_semaphores()
        _allow_open_files()
    return loader


def _check_sockets() -> None:
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise UserError(
            f"DATALOADER.NUM_WORKERS: data loading processes need sockets in the temporary folder {tempfile.gettempdir()} "
            f"({error}); set TMPDIR to another folder with a shorter path, such as /tmp."
        ) from error


def _check_semaphores() -> None:
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        raise UserError(
            f"DATALOADER.NUM_WORKERS: data loading processes need semaphores in /dev/shm ({error.strerror}); make it writable, or "
            "set DATALOADER.NUM_WORKERS 0."
        ) from error


def _allow_open_files() -> None:
    """Raise the limit on open files as far as allowed: each tensor on its way from a worker is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _init_worker(worker_id: int) -> None:
    """Limit a worker to one thread, and ignore the stop signals that a cluster or terminal may send to all processes of a job.

    SIGTERM from the parent process terminates the worker at any time. So does a batch that cannot be sent, for which the
    parent process would wait forever.
    """
    Queue._on_queue_feeder_error = staticmethod(_exit_on_unsent_batch)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _exit_on_unsent_batch(error: Exception, batch: object) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
