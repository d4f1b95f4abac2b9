#!/usr/bin/env python
"""Label the training images by the teacher, once, as an annotation file in COCO's format.

    tools/pseudo_labels.py --config-file CONFIG --output labels.json [--dataset NAME] [--score-thresh T] [KEY VALUE ...]

CONFIG names teacher and data; with MODEL.KD.PSEUDO_LABELS.ENABLED in it no annotation has to exist. Detections above the
score become annotations, with masks where the teacher predicts them. The program ends with the overrides of CONFIG that train
on the file. Training with MODEL.KD.PSEUDO_LABELS.ENABLED does without such a file: there the teacher labels every augmented
image anew.
"""

import argparse
import json
import os
import shlex

from kd_d2 import Teacher, UserError, load_config
from kd_d2.data import build_test_loader, register_coco_json, register_synthetic
from kd_d2.engine.checks import check_classes, check_datasets, check_distillation, check_output_folder
from kd_d2.errors import exit_on_user_error
from kd_d2.pseudo_labels import PseudoLabels, label_images

import torch
from detectron2.config import CfgNode
from tqdm import tqdm


def choose_dataset(cfg: CfgNode, name: str | None) -> str:
    """The data set that was asked for, or the one of DATASETS.TRAIN.

    Raises:
        UserError: it is not in DATASETS.TRAIN, or there are several.
    """
    names = cfg.DATASETS.TRAIN
    if name is None and len(names) > 1:
        raise UserError(f"DATASETS.TRAIN has {len(names)} data sets: choose one of {', '.join(names)} by --dataset.")
    if name is not None and name not in names:
        raise UserError(f"--dataset {name!r} is not in DATASETS.TRAIN: {', '.join(names)}.")
    return name or names[0]


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    check_distillation(cfg)
    threshold = cfg.MODEL.KD.PSEUDO_LABELS.SCORE_THRESH if args.score_thresh is None else args.score_thresh
    if not 0 <= threshold < 1:
        raise UserError(f"--score-thresh is {threshold}; it must be from 0 to below 1.")
    register_synthetic()
    register_coco_json(cfg)
    check_datasets(cfg, train=True)
    name = choose_dataset(cfg, args.dataset)
    check_output_folder(os.path.dirname(os.path.abspath(args.output)), "--output")
    teacher = Teacher.from_config(cfg)
    check_classes(cfg, teacher.model)
    if "detections" not in teacher.spec.provides or teacher.spec.num_classes is None:
        raise UserError(f"The teacher ({teacher.spec.name}) does not tell its classes, so it cannot label.")
    PseudoLabels(threshold).check_threshold(teacher.spec)
    teacher.to(torch.device(cfg.MODEL.DEVICE))
    loader = build_test_loader(cfg, name)

    def detect(batch: list[dict]) -> list[dict]:
        return teacher.model(teacher.to_input_format(batch))

    tree, folder = label_images(detect, tqdm(loader, unit="image"), teacher.spec.num_classes, name, threshold)
    with open(args.output, "w", encoding="utf-8") as file:
        json.dump(tree, file)
    print(f"{len(tree['annotations'])} annotations of {len(tree['images'])} images, scores above {threshold}")
    print(overrides_to_train_on(cfg, name, [f"{name}_by_teacher", os.path.abspath(args.output), folder]))


def overrides_to_train_on(cfg: CfgNode, name: str, labelled: list[str]) -> str:
    """Overrides of the config, as for a command line, that put a labelled data set in the place of one of DATASETS.TRAIN.

    Args:
        labelled: its entry of DATASETS.COCO_JSON.
    """
    files = [*(list(entry) for entry in cfg.DATASETS.COCO_JSON if entry[0] != labelled[0]), labelled]
    names = tuple(labelled[0] if other == name else other for other in cfg.DATASETS.TRAIN)
    keys = {"DATASETS.COCO_JSON": files, "DATASETS.TRAIN": names, "MODEL.KD.PSEUDO_LABELS.ENABLED": False}
    return " ".join(f"{key} {shlex.quote(str(value))}" for key, value in keys.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of a distillation: teacher and data")
    parser.add_argument("--output", required=True, help="the annotation file")
    parser.add_argument("--dataset", help="which of DATASETS.TRAIN (default the only one)")
    parser.add_argument("--score-thresh", type=float, help="default MODEL.KD.PSEUDO_LABELS.SCORE_THRESH")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    with exit_on_user_error():
        main(parser.parse_args())
