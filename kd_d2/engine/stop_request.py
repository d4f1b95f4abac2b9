"""Stop requests: signals that stop a training after the current iteration, on all ranks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Self

from ..signals import SAME_REQUEST, SIGNALS, handled_by


class TrainingStopped(SystemExit):
    """A signal stopped the training. The exit status is 128 + the signal number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class StopRequest:
    """Context manager that records the first of SIGNALS received; a second one ends the process immediately.

    Attributes:
        number: number of the received signal; 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._received = 0.0
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._handlers.enter_context(handled_by(self._receive, SIGNALS))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def raise_if_received(self) -> None:
        """Raise `TrainingStopped` if a signal was received."""
        if self.number:
            raise TrainingStopped(self.number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._received = number, time.monotonic()
            name = signal.Signals(number).name
            # Do not use logging or print, which the signal may have interrupted.
            with contextlib.suppress(OSError):  # the terminal is closed
                os.write(2, f"{name}: stopping after this iteration; send it again to stop at once\n".encode())
        elif time.monotonic() - self._received > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            os._exit(128 + number)  # the first process of a container survives the signal


@contextlib.contextmanager
def forwarded_to_children() -> Iterator[None]:
    """Forward SIGNALS to the child processes within this context."""

    def forward(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    with handled_by(forward, SIGNALS):
        yield
