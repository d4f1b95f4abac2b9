"""Signals that stop a program: SIGTERM and SIGUSR1 from Kubernetes, Slurm and spot instances, SIGHUP and Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_REQUEST = 2.0
"""Seconds within which signals count as one: terminals and launchers signal both a process group and its members."""


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
        self._handlers.enter_context(_handled_by(self._receive, SIGNALS))
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

    with _handled_by(forward, SIGNALS):
        yield


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise SystemExit on SIGNALS except Ctrl-C within this context, so that cleanup runs as for its KeyboardInterrupt."""
    last = -math.inf

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > SAME_REQUEST:
            sys.exit(128 + number)

    with _handled_by(leave, [number for number in SIGNALS if number != signal.SIGINT]):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None], signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Handle the signals within this context, but SIGHUP only if it is not ignored, as under nohup.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    handled = [number for number in signals if number != signal.SIGHUP or not is_under_nohup]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
