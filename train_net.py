#!/usr/bin/env python
"""Train or evaluate a detector, either a plain one or a student with a teacher.

train_net.py --config-file CONFIG [--num-gpus N] [--resume] [--eval-teacher] [KEY VALUE ...]
train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS CHECKPOINT [KEY VALUE ...]
train_net.py --config-file CONFIG --eval-only --eval-teacher [KEY VALUE ...]
"""

import argparse

from kd_d2.cores import limit_threads
from kd_d2.errors import check_docstrings, exit_on_user_error

with exit_on_user_error():
    limit_threads()  # before PyTorch is imported
    check_docstrings()  # before Detectron2 is imported, which needs them

from kd_d2.arguments import add_import_argument, add_rank_timeout_argument
from kd_d2.engine import launch
from kd_d2.engine.program import main

from detectron2.engine import default_argument_parser


def argument_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser()
    parser.add_argument(
        "--eval-teacher",
        action="store_true",
        help="evaluate the teacher before training, or with --eval-only, only the teacher",
    )
    add_import_argument(parser)
    add_rank_timeout_argument(parser)
    return parser


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
