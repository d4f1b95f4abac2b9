"""The one error type that speaks to the user instead of to a programmer, and how programs end with it."""

import contextlib
import errno
import math
import sys
from collections.abc import Iterator

from .text import keep_controls_out_of_logs, printable

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """An error that the user can fix: the message is one sentence that names the key, file or value.

    What a file may have put into the message stays on its line: control characters are written as escapes, and the middle of a very
    long message is left out.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def is_finite_number(value: object) -> bool:
    """Whether `value` is an int or a float, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_number(key: str, value: object, minimum: float, *, exclusive: bool = False) -> None:
    """Raise a UserError that names `key` unless `value` is a finite number of at least (or, exclusive, above) `minimum`."""
    if not is_finite_number(value) or value < minimum or (exclusive and value == minimum):
        relation = "above" if exclusive else "at least"
        raise UserError(f"{key} is {value!r}; it must be a number {relation} {minimum}.")


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """A UserError inside, or a disk that is full, is printed as one sentence, and ends the program with exit status 2.

    Ctrl-C ends it with 130. Logs are kept free of control characters.
    """
    keep_controls_out_of_logs()
    try:
        yield
    except UserError as error:
        end_with(error)
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        end_with(printable(f"{error.filename or 'A file'} cannot be written: {error.strerror}."))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def end_with(sentence: object) -> None:
    """Print why the program cannot continue, and end it with exit status 2."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)
