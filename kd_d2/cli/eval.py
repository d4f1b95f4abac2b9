"""Evaluate a trained detector, a file of kd-d2 export, or the teacher of a distillation, on DATASETS.TEST.

kd-d2 eval --model CONFIG_OR_RUN [WEIGHTS] [KEY VALUE ...]
kd-d2 eval --model CONFIG_OR_RUN EXPORTED [KEY VALUE ...]
kd-d2 eval --teacher-of CONFIG [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import os

from ..arguments import add_import_argument, add_launch_arguments, add_model_argument
from ..errors import UserError
from ..model_paths import read_one_model_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group(required=True)
    add_model_argument(choice, "one", required=False)
    choice.add_argument("--teacher-of", metavar="CONFIG", help="evaluate the teacher of this config")
    add_import_argument(parser)
    add_launch_arguments(parser)
    parser.set_defaults(eval_only=True, resume=False)


def run(args: argparse.Namespace) -> None:
    from ..engine import launch, program

    evaluate = program.main
    args.eval_teacher = args.teacher_of is not None
    args.config_file = args.teacher_of
    if not args.eval_teacher:
        model = read_one_model_path(args.model, may_be_exported=True)
        args.config_file = model.config
        if model.run is not None:  # it may have been moved since its config was written
            args.opts = ["OUTPUT_DIR", os.path.abspath(model.run), *args.opts]
        if model.exported is None:
            args.opts = [*model.overrides, *args.opts]
        elif model.config == model.exported:
            raise UserError(f"--model {model.config} names no data; use --model CONFIG_OR_RUN {model.config}.")
        else:
            from ..export import evaluating

            evaluate, args.exported = evaluating.main, model.exported
            args.opts += ["MODEL.WEIGHTS", ""]
    launch(evaluate, args)
