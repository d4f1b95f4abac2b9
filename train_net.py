#!/usr/bin/env python
"""Train or evaluate a detector: plain, or a student with a teacher.

train_net.py --config-file CONFIG [--num-gpus N] [--resume] [--eval-teacher] [KEY VALUE ...]
train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS CHECKPOINT [KEY VALUE ...]
train_net.py --config-file CONFIG --eval-only --eval-teacher [KEY VALUE ...]
"""

import argparse
import os

from kd_d2 import Teacher, UserError
from kd_d2.checkpoint import load_complete
from kd_d2.config import KD_META_ARCH
from kd_d2.engine import KDTrainer, evaluate_teacher, launch, setup
from kd_d2.engine.checks import check_classes
from kd_d2.files import write_json

from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils import comm


def main(args: argparse.Namespace) -> dict | None:
    cfg = setup(args)
    if args.eval_teacher and cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH:
        raise UserError(f"--eval-teacher: MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has no teacher.")
    if args.eval_only and args.eval_teacher:
        results = evaluate_teacher(cfg, Teacher.from_config(cfg))
        write_results(cfg.OUTPUT_DIR, "teacher.json", results)
        return results
    if args.eval_only:
        if not cfg.MODEL.WEIGHTS:
            raise UserError("--eval-only needs MODEL.WEIGHTS: name the checkpoint that is to be evaluated.")
        model = build_model(cfg)
        check_classes(cfg, model)
        load_complete(model, cfg.MODEL.WEIGHTS, "the detector")
        results = KDTrainer.test(cfg, model)
        write_results(cfg.OUTPUT_DIR, "eval.json", results)
        return results

    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if args.eval_teacher:
        write_results(cfg.OUTPUT_DIR, "teacher.json", evaluate_teacher(cfg, trainer.bare_model.teacher))
    trainer.train()
    results = getattr(trainer, "_last_eval_results", {})
    write_results(cfg.OUTPUT_DIR, "train.json", results)
    return results


def write_results(folder: str, name: str, results: dict) -> None:
    if comm.is_main_process():
        write_json(os.path.join(folder, name), results)


def argument_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser()
    parser.add_argument(
        "--eval-teacher",
        action="store_true",
        help="evaluate the teacher once before training, or with --eval-only the teacher alone",
    )
    return parser


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
