"""Evaluate a trained detector, or the teacher of a distillation, on DATASETS.TEST.

kd-d2 eval --model CONFIG_OR_RUN [WEIGHTS] [KEY VALUE ...]
kd-d2 eval --teacher-of CONFIG [KEY VALUE ...]
"""

from __future__ import annotations

import argparse

from ..model_paths import read_one_model_path
from .arguments import add_import_argument, add_launch_arguments, add_model_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group(required=True)
    add_model_argument(choice, "one", required=False)
    choice.add_argument("--teacher-of", metavar="CONFIG", help="evaluate the teacher that this config names")
    add_import_argument(parser)
    add_launch_arguments(parser)
    parser.set_defaults(eval_only=True, resume=False)


def run(args: argparse.Namespace) -> None:
    from ..engine import launch
    from ..engine.program import main

    args.eval_teacher = args.teacher_of is not None
    args.config_file = args.teacher_of
    if not args.eval_teacher:
        model = read_one_model_path(args.model)
        args.config_file = model.config
        args.opts += model.overrides
    launch(main, args)
