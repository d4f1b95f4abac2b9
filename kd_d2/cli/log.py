"""Log messages on the terminal."""

from __future__ import annotations

import logging
import sys


def print_log() -> None:
    """Print the messages of the library's loggers without prefixes, for commands that have no log file."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("kd_d2")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
