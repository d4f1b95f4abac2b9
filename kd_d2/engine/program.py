"""Main function of train_net.py, `kd-d2 train` and `kd-d2 eval`."""

from __future__ import annotations

import argparse
import os

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..checkpoint import load_complete
from ..class_names import match_classes, names_in_checkpoint, names_in_data
from ..config import KD_META_ARCH
from ..errors import UserError
from ..extensions import import_extensions
from ..files import write_json
from ..modeling.building import build_detector
from ..teacher import Teacher
from .checks import check_classes
from .setup import setup, write_configs
from .trainer import KDTrainer, evaluate_teacher


def main(args: argparse.Namespace) -> dict | None:
    """Train, evaluate the detector (`eval_only`) or the teacher (both flags), or evaluate the teacher and then train.

    Args:
        args: `config_file`, `opts`, `imports`, `resume`, `eval_only` and `eval_teacher`.

    Returns:
        The evaluation results by task, which are also written to OUTPUT_DIR as JSON.
    """
    import_extensions(args.imports)
    cfg = setup(args)
    if args.eval_teacher and cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH:
        raise UserError(f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has no teacher.")
    if args.eval_only and args.eval_teacher:
        results = evaluate_teacher(cfg, Teacher.from_config(cfg))
        write_results(cfg.OUTPUT_DIR, "teacher.json", results)
        return results
    if args.eval_only:
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: name the checkpoint to evaluate.")
        model = build_detector(cfg)
        check_classes(cfg, model)
        load_complete(model, cfg.MODEL.WEIGHTS, "the detector")
        match_classes(model, "the detector", names_in_checkpoint(cfg.MODEL.WEIGHTS), names_in_data(cfg))
        results = KDTrainer.test(cfg, model)
        write_results(cfg.OUTPUT_DIR, "eval.json", results)
        verify(cfg, results)
        return results

    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if args.eval_teacher:
        write_results(cfg.OUTPUT_DIR, "teacher.json", evaluate_teacher(cfg, trainer.bare_model.teacher))
    write_configs(cfg)
    trainer.train()
    results = getattr(trainer, "_last_eval_results", {})
    write_results(cfg.OUTPUT_DIR, "train.json", results)
    verify(cfg, results)
    return results


def verify(cfg: CfgNode, results: dict) -> None:
    """Exit with status 1 if the results differ from TEST.EXPECTED_RESULTS, on rank 0 only.

    Raises:
        UserError: there are no results of a task.
    """
    if not comm.is_main_process():
        return
    for task, *_ in cfg.TEST.EXPECTED_RESULTS:
        if task not in results:
            raise UserError(
                f"TEST.EXPECTED_RESULTS names the task {task!r}, but the results are those of {', '.join(results) or 'no task'}."
            )
    verify_results(cfg, results)


def write_results(folder: str, name: str, results: dict) -> None:
    """Write evaluation results as JSON, on rank 0 only."""
    if comm.is_main_process():
        write_json(os.path.join(folder, name), results)
