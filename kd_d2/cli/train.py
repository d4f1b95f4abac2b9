"""Train a plain detector, or a student with a teacher.

kd-d2 train CONFIG [--resume] [--eval-teacher] [--num-gpus N] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse

from ..arguments import add_config_argument, add_import_argument, add_launch_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser)
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-teacher", action="store_true", help="evaluate the teacher before training")
    add_import_argument(parser)
    add_launch_arguments(parser)
    parser.set_defaults(eval_only=False)


def run(args: argparse.Namespace) -> None:
    from ..engine import launch
    from ..engine.program import main

    launch(main, args)
