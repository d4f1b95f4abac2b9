"""Signals that stop a program: SIGTERM and SIGUSR1 from Kubernetes, Slurm and spot instances, SIGHUP and Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_REQUEST = 2.0
"""Seconds within which signals count as one: terminals and launchers signal both a process group and its members."""


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise SystemExit on SIGNALS except Ctrl-C within this context, so that cleanup runs as for its KeyboardInterrupt."""
    last = -math.inf

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > SAME_REQUEST:
            sys.exit(128 + number)

    with handled_by(leave, [number for number in SIGNALS if number != signal.SIGINT]):
        yield


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Handle SIGNALS that arrive within this context at its end."""
    received: list[int] = []
    with handled_by(lambda number, frame: received.append(number), SIGNALS):
        yield
    for number in received:
        signal.raise_signal(number)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None], signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Handle those of the signals that this process does not ignore within this context.

    Programs start with SIGHUP ignored under nohup, and with SIGINT ignored if a script starts them with `&`. Does nothing
    outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
