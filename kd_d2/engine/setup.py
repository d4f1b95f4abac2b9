"""Program setup: config, data checks, logging and output folder."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import glob
import logging
import os
import shlex
import sys

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..checkpoint import checkpoint_files
from ..class_names import as_comment, names_in_checkpoint, names_in_data, names_in_training_set
from ..config import KD_META_ARCH, SolverKeys, changed_keys, detector_of, load_config, read_config, thawed
from ..config_files import find_config_file
from ..data import ClassOrder, register_coco_json, register_synthetic, resolve_epochs
from ..data.sampling import check_sampler
from ..distillers import DISTILLER_REGISTRY
from ..errors import UserError
from ..files import check_output_folder, remove_leftovers, write_json, write_text
from ..keys import keys_of
from ..modeling import unused_nodes
from ..text import is_unicode, keep_controls_out_of_logs
from ..versions import versions
from .checks import (
    autocast_advice,
    check_best_metric,
    check_datasets,
    check_device,
    check_expected_results,
    check_float32_precision,
    missing_gpu_advice,
)
from .folder_lock import lock_folder
from .learning_rate import learning_rate_advice

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """Check config and data, set up logging, and write the files of `write_configs` to OUTPUT_DIR.

    The files of an existing training are not changed: a new training replaces them when it starts, and locks the folder
    until it ends.

    Args:
        args: `config_file`, which is replaced with the path of the file, `opts`, `resume`, `eval_only` and `eval_teacher`.

    Raises:
        UserError: the config, the data or the output folder is invalid.
    """
    if args.config_file:
        args.config_file = find_config_file(args.config_file, "the config")
    cfg = load_config(args.config_file, args.opts, student_only=args.eval_only and not args.eval_teacher)
    if args.eval_only and args.resume:
        cfg.MODEL.WEIGHTS = next(iter(checkpoint_files(cfg.OUTPUT_DIR)), cfg.MODEL.WEIGHTS)
    check_device(cfg, comm.get_world_size())
    check_float32_precision(cfg)
    if not args.eval_only and not is_unicode(cfg.OUTPUT_DIR):
        raise UserError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} is not UTF-8, which the logs of TensorBoard need: rename the folder, or set LC_ALL to a UTF-8 locale."
        )
    check_output_folder(cfg.OUTPUT_DIR)
    keep_controls_out_of_logs()
    for name in ("fvcore", "detectron2", "kd_d2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    atexit.register(_close_log_file)
    if comm.is_main_process() and not args.eval_only:
        lock_folder(cfg.OUTPUT_DIR)
        remove_leftovers(os.path.join(glob.escape(cfg.OUTPUT_DIR), "model_*.pth"))
    register_synthetic()
    register_coco_json(cfg, _class_order(cfg, args), train=not args.eval_only)
    check_datasets(cfg, train=not args.eval_only)
    check_expected_results(cfg)
    check_best_metric(cfg)
    if not args.eval_only:
        check_sampler(cfg)
        cfg = resolve_epochs(cfg)
    cfg.freeze()
    config_file = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if comm.is_main_process():
        _log_run(cfg, args, config_file)
        if not os.path.isfile(config_file):
            write_configs(cfg)
    if cfg.DATASETS.TEST and detector_of(cfg) == "PanopticFPN":
        logger.info("PanopticFPN is evaluated on boxes and masks only, not on semantic and panoptic segmentation.")
    seed_all_rng(None if cfg.SEED < 0 else (cfg.SEED + comm.get_rank()) % 2**32)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    set_float32_precision(cfg)
    if not getattr(args, "exported", None) and comm.is_main_process():
        advice = missing_gpu_advice(read_config(args.config_file, args.opts).MODEL.DEVICE, cfg.MODEL.DEVICE)
        if advice:
            logger.warning(advice)
    if args.config_file and not args.eval_only:
        for advice in (learning_rate_advice(args.config_file, args.opts), autocast_advice(cfg)):
            if advice:
                logger.warning(advice)
    return cfg


def set_float32_precision(cfg: CfgNode) -> None:
    """Apply FLOAT32_PRECISION to matrix products and convolutions on a GPU, as Detectron2's `default_setup` does."""
    precision = cfg.get("FLOAT32_PRECISION", "")
    if precision and torch.device(cfg.MODEL.DEVICE).type == "cuda":
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"


def _close_log_file() -> None:
    """Close the log file before Detectron2 does, which prints a message about a full disk once more."""
    for handler in logging.getLogger("kd_d2").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream not in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                handler.stream.close()


def write_configs(cfg: CfgNode) -> None:
    """Write `config.yaml`, `student.yaml` and `versions.json` to OUTPUT_DIR, on rank 0 only."""
    if not comm.is_main_process():
        return
    classes = names_in_data(cfg)
    comment = as_comment(classes.names) if classes else ""  # Detectron2 has no key for class names
    write_text(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), _without_unused_methods(cfg).dump())
    write_text(os.path.join(cfg.OUTPUT_DIR, "student.yaml"), comment + student_config(cfg).dump())
    write_json(os.path.join(cfg.OUTPUT_DIR, "versions.json"), versions())


def _without_unused_methods(cfg: CfgNode) -> CfgNode:
    """Drop the nodes of unused methods, which can only be read where these are registered; those with changed keys are kept."""
    changed = {key.split(".")[2] for key in changed_keys(cfg) if key.startswith("MODEL.KD.") and key.count(".") > 2}
    kept = thawed(cfg)
    for name, method in DISTILLER_REGISTRY:
        if name not in cfg.MODEL.KD.DISTILLERS and method.CONFIG_NODE not in changed:
            kept.MODEL.KD.pop(method.CONFIG_NODE, None)
    return kept


def _log_run(cfg: CfgNode, args: argparse.Namespace, config_file: str) -> None:
    """Log the environment, the command line and the changed config keys; the config is in `config_file`."""
    logger.info(f"Processes: {comm.get_world_size()}. Environment:\n{_environment()}")
    logger.info(f"Command line: {shlex.join(sys.argv)}")
    changed = "\n".join(f"  {key}: {value!r}" for key, value in changed_keys(cfg).items())
    logger.info(
        f"Config keys that differ from their defaults (all keys of the training are in {config_file}):\n{changed}"
    )


def _environment() -> str:
    """Return the versions of the machine's software, or why the programs that print them cannot be started."""
    try:
        return collect_env_info()
    except (OSError, RuntimeError) as error:
        return f"unknown ({error})"


def _class_order(cfg: CfgNode, args: argparse.Namespace) -> ClassOrder | None:
    """Return the class order of an existing model, or None to use the order of the data."""
    if args.eval_only:
        names = None if args.eval_teacher else names_in_checkpoint(cfg.MODEL.WEIGHTS)
        return names or names_in_training_set(cfg)
    files = checkpoint_files(cfg.OUTPUT_DIR) if args.resume else []
    return names_in_checkpoint(files[0]) if files else None


def student_config(cfg: CfgNode) -> CfgNode:
    """Return the student's plain Detectron2 config; only keys for this library's own detector or backbone are kept."""
    plain = thawed(cfg)
    if plain.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        plain.MODEL.META_ARCHITECTURE = plain.MODEL.KD.STUDENT
    del plain.MODEL["KD"]
    del plain.DATASETS["COCO_JSON"], plain.DATASETS["TRAIN_REPEAT_FACTOR"]
    del plain.INPUT["LARGE_SCALE_JITTER"], plain.INPUT["AUGMENTATIONS"]
    del plain.SOLVER.AMP["DTYPE"]
    for key in keys_of(SolverKeys):
        del plain.SOLVER[key.name]
    del plain.TEST["BEST_METRIC"]
    del plain.DATALOADER["SKIP_UNUSABLE_IMAGES"]
    del plain.DATALOADER["RANDOM_SUBSET_RATIO"]
    for name in unused_nodes(plain):
        del plain.MODEL[name]
    plain.DATASETS.TRAIN, plain.DATASETS.TEST = (), ()
    plain.MODEL.WEIGHTS = ""
    plain.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = False  # which needs DATASETS.TRAIN, for training only
    return plain
