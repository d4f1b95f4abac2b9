"""Signals that ask a training to stop: those of Kubernetes, Slurm and spot machines (SIGTERM, SIGUSR1), and Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 2.0
"""Seconds within which signals count as one: terminals and launchers send a request to a process group and to its members."""


class TrainingStopped(SystemExit):
    """A training stopped because a signal asked for it. The exit status is 128 + the number of the signal."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class StopRequest:
    """Within this context the first of SIGNALS is remembered; a second one ends the process at once.

    Attributes:
        number: of the signal that was received; 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._received = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def raise_if_received(self) -> None:
        """Raise `TrainingStopped` after a signal."""
        if self.number:
            raise TrainingStopped(self.number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._received = number, time.monotonic()
            name = signal.Signals(number).name
            # Not through logging or print, which the signal may have interrupted.
            os.write(2, f"{name}: stopping after this iteration; send it again to stop at once\n".encode())
        elif time.monotonic() - self._received > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def forwarded_to_children() -> Iterator[None]:
    """Within this context, SIGNALS are passed on to the processes that this one has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within this context SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt: what has been started can be ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
