#!/usr/bin/env python
"""AP of a student if its class scores ranked each object's candidates as the teacher's do.

    tools/rank_oracle.py --config-file CONFIG --weights CHECKPOINT [--images 400] [KEY VALUE ...]

AP of the student on the first images of the test set that have objects: as it is; with the class scores of each object's positive anchors
distributed over these in the teacher's order, all else unchanged; and with the teacher's scores in their place. CONFIG is a
distillation's, CHECKPOINT any of a student of its kind; both detectors are dense ones with the same anchors.
"""

import argparse

from kd_d2 import UserError, load_config
from kd_d2.config import find_file
from kd_d2.data import register_coco_json, register_synthetic
from kd_d2.engine.analysed import load_dense_pair
from kd_d2.engine.checks import check_datasets
from kd_d2.errors import exit_on_user_error
from kd_d2.evaluation.examples import read_examples
from kd_d2.evaluation.rank_oracle import rank_oracle

from tabulate import tabulate

COLUMNS = ("AP", "AP50", "AP75")


def main(args: argparse.Namespace) -> None:
    if args.images < 1:
        raise UserError(f"--images is {args.images}; it must be at least 1.")
    cfg = load_config(args.config_file, args.opts)
    weights = find_file(args.weights, "--weights")
    register_synthetic()
    register_coco_json(cfg)
    check_datasets(cfg, train=False)
    model = load_dense_pair(cfg, weights, "tools/rank_oracle.py")
    results = rank_oracle(cfg, model, read_examples(cfg, args.images))
    rows = [[name, *(result[column] for column in COLUMNS)] for name, result in results.items()]
    print(tabulate(rows, headers=["", *COLUMNS], tablefmt="github", floatfmt=".2f"), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of the distillation")
    parser.add_argument("--weights", required=True, help="a checkpoint of the student")
    parser.add_argument("--images", type=int, default=400, help="of the test set, with objects (default 400)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    with exit_on_user_error():
        main(parser.parse_args())
