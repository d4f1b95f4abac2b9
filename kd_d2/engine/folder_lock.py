"""A lock that allows one training at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from typing import IO

from ..errors import UserError
from ..files import named_in_errors

LOCK = ".training.lock"
logger = logging.getLogger(__name__)
_held: dict[str, IO] = {}


def lock_folder(folder: str) -> None:
    """Lock an output folder for this process until `unlock_folder` is called or the process exits for any reason.

    This is a POSIX record lock: child processes do not inherit it, and this process may acquire it again.

    Raises:
        UserError: another process holds the lock.
    """
    folder = os.path.realpath(folder)
    if folder not in _held:  # open once: closing any other descriptor of the file would release the lock
        _held[folder] = open(os.path.join(folder, LOCK), "a+", encoding="utf-8")  # noqa: SIM115
    file = _held[folder]
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning(
                f"OUTPUT_DIR {folder} cannot be locked ({error.strerror}): make sure that no other training uses it."
            )
            return
        file.seek(0)
        owner = file.read().strip()
        unlock_folder(folder)
        raise UserError(
            f"OUTPUT_DIR {folder} is in use by another training ({owner}); choose another folder, or wait until it has finished."
        ) from error
    with named_in_errors(file.name):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def unlock_folder(folder: str) -> None:
    """Release the lock on an output folder if this process holds it."""
    file = _held.pop(os.path.realpath(folder), None)
    if file is not None:
        file.close()
