"""Log messages on the terminal."""

from __future__ import annotations

import logging
import sys

HANDLER = logging.StreamHandler()
HANDLER.setFormatter(logging.Formatter("%(message)s"))


def print_log() -> None:
    """Print the messages of the library's loggers without prefixes, for commands that have no log file."""
    HANDLER.stream = sys.stdout
    logger = logging.getLogger("kd_d2")
    logger.addHandler(HANDLER)  # once, however often it is called
    logger.setLevel(logging.INFO)
