"""Run distillation end to end on a synthetic dataset: a teacher, a small student alone, and the same student distilled.

kd-d2 demo [--output DIR]

Prints a table, and saves plots and pictures of detections. An interrupted demo resumes where it stopped.
"""

from __future__ import annotations

import argparse

from ..errors import UserError
from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        default="output/demo",
        metavar="DIR",
        help="folder for runs, table and pictures (default output/demo)",
    )


def run(args: argparse.Namespace) -> None:
    from ..demo import run_demo

    if args.opts:
        raise UserError("kd-d2 demo takes no overrides; kd-d2 sweep demo/matrix does.")
    print_log()
    run_demo(args.output)
