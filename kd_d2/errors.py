"""Errors that the user can fix, and program exit with their messages."""

import contextlib
import errno
import io
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator

from .text import keep_controls_out_of_logs, printable

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GPU_IS_FULL = re.compile(r"(CUDA|HIP)( driver)? error: out of memory|hipErrorOutOfMemory|[A-Z]_STATUS_ALLOC_FAILED")
"""Matches errors of a GPU's driver and libraries, which occur if other programs use the GPU's memory."""
OTHER_MEMORY_IS_FULL = re.compile(r"MPS backend out of memory|can't allocate memory")
NO_MORE_PROCESSES = re.compile(r"can't start new thread|(\[Errno \d+\] )?Resource temporarily unavailable")


class UserError(Exception):
    """An error that the user can fix. Its message is one sentence that names the key, file or value.

    Control characters, which text from files may contain, are escaped, and very long messages are shortened in the
    middle.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error means that there is too little memory, on a GPU or in the machine."""
    import torch  # not at the top: programs without tensors start faster

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error)
    return bool(GPU_IS_FULL.search(message) or OTHER_MEMORY_IS_FULL.search(message))


def explain_lack_of_resources(error: BaseException | None, advice: str) -> str | None:
    """Return a clause for an error that means too little memory, too few files or processes, no temporary folder, or failed
    data loading.

    Args:
        error: any error; the result is None if it has another cause.
        advice: what to do if there is too little memory.
    """
    reason = str(error).strip().partition("\n")[0].rstrip(" .")
    if "Too many open files" in reason:
        return (
            f"Too many open files ({reason}): raise the limit (ulimit -n, at most ulimit -Hn), or use fewer data loading processes or "
            "smaller batches"
        )
    if "No usable temporary directory" in reason:
        return (
            f"No folder for temporary files is writable ({reason}): free space in one of them, or set TMPDIR to another"
        )
    if NO_MORE_PROCESSES.fullmatch(reason):
        return (
            f"No more processes or threads can be started ({reason}): raise the limit (ulimit -u, or the number of processes of the container or "
            "job), or lower DATALOADER.NUM_WORKERS and OMP_NUM_THREADS"
        )
    if isinstance(error, EOFError | ConnectionError) and _is_from_data_loading(error):
        return (
            f"A data loading process failed ({reason or type(error).__name__}): see its error above; if there is none, it was killed, most "
            "likely because the machine ran out of memory: lower DATALOADER.NUM_WORKERS"
        )
    if reason.startswith("DataLoader worker"):
        if "with exit code" in f"{error} {error.__cause__}":
            return f"A data loading process failed ({reason}): see its error above"
        return f"A data loading process died ({reason}), most likely because it ran out of memory: lower DATALOADER.NUM_WORKERS"
    if not is_out_of_memory(error):
        return None
    others = "look with nvidia-smi or rocm-smi for other programs on the GPU; otherwise "
    hint = others if GPU_IS_FULL.search(str(error)) else ""
    return f"Out of memory ({reason or type(error).__name__}): {hint}{advice}"


def _is_from_data_loading(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.endswith("torch/multiprocessing/reductions.py") for frame, _ in frames)


def system_error(error: BaseException | None) -> OSError | None:
    """Return an OSError itself, or the one that torch's writer of archives hides behind a RuntimeError, or None."""
    is_of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    hidden = error.__context__ if is_of_torch else error
    return hidden if isinstance(hidden, OSError) else None


def as_user_error(error: Exception) -> UserError | None:
    """Return a UserError for a lack of disk space, permissions, memory, files or processes, or None for other errors."""
    advice = "free memory, or lower the image sizes in INPUT, such as INPUT.MIN_SIZE_TEST"
    if clause := explain_lack_of_resources(error, advice):
        return UserError(f"{clause}.")
    system = system_error(error)
    if system is None:
        return None
    if system.errno in (*DISK_IS_FULL, errno.EROFS):
        return UserError(f"{system.filename or 'A file'} cannot be written: {system.strerror}.")
    if isinstance(system, PermissionError) and system.filename:
        return UserError(f"{system.filename} cannot be accessed: {system.strerror}.")
    return None


def is_finite_number(value: object) -> bool:
    """Return whether `value` is an int or a float, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_number(key: str, value: object, minimum: float, *, exclusive: bool = False) -> None:
    """Raise a UserError that names `key` unless `value` is finite and at least (if `exclusive`, above) `minimum`."""
    if not is_finite_number(value) or value < minimum or (exclusive and value == minimum):
        relation = "above" if exclusive else "at least"
        raise UserError(f"{key} is {value!r}; it must be a number {relation} {minimum}.")


def check_at_least(option: str, value: int | None, minimum: int) -> None:
    """Raise a UserError that names the option if its value is too small; None means that the option is not given."""
    if value is not None and value < minimum:
        raise UserError(f"{option} is {value}; it must be at least {minimum}.")


def check_score_threshold(value: float | None) -> None:
    """Raise a UserError if the value of --score-thresh is not a score; None means that the option is not given."""
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"--score-thresh is {value}; it must be between 0 and 1.")


def check_seed(key: str, seed: int) -> None:
    """Raise a UserError that names `key` unless NumPy accepts a seed; negative ones mean a random seed."""
    if seed >= 2**32:
        raise UserError(f"{key} is {seed}; it must be below 2**32.")


def check_docstrings() -> None:
    """Raise a UserError if Python runs without docstrings."""
    if sys.flags.optimize > 1:
        raise UserError("Detectron2 needs docstrings, which python -OO and PYTHONOPTIMIZE=2 remove; use -O or neither.")


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with status 2 and a one-sentence message on a UserError or an error that `as_user_error` explains.

    Exits with status 130 on Ctrl-C, and with status 1 if the reader of the output, such as `head`, has closed it.
    Streams that are closed from the beginning (`>&-`) become the null device, and characters that their encoding lacks
    are escaped. Also keeps control characters out of the logs.
    """
    _open_standard_streams()
    keep_controls_out_of_logs()
    logging.raiseExceptions = False  # do not print a traceback per message if the log file cannot be written
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        end_with(error)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        raise  # from another pipe
    except (OSError, RuntimeError, MemoryError, EOFError) as error:
        sentence = as_user_error(error)
        if sentence is None:
            raise
        end_with(sentence)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _open_standard_streams() -> None:
    """Open the null device for closed file descriptors from 0 to 2, which other files would get otherwise."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def end_with(sentence: object) -> None:
    """Print an error message and exit with status 2."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)
