#!/usr/bin/env python
"""What SOLVER.CHANNELS_LAST and MODEL.KD.TEACHER.CHANNELS_LAST together make of an iteration's seconds.

    benchmarks/channels_last.py [--pair tiny|coco] [--methods NAME[+NAME] ...] [--rounds N] [--threads N]

Every variant of benchmarks/step.py takes turns with itself with channels last; a ratio is within a round.
"""

import argparse
import statistics

from kd_d2 import KDMetaArch
from kd_d2.engine.step import DistillationStep
from measuring import device_name, seconds
from step import PAIRS, PAST_WARM_UPS, PLAIN, WHOLE, Bench

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate


def with_channels_last(step: DistillationStep) -> DistillationStep:
    step.model.to(memory_format=torch.channels_last)
    if isinstance(step.model, KDMetaArch):
        step.model.teacher.model.to(memory_format=torch.channels_last)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--methods", nargs="+", default=["StructuralKD", "ICD", "RankMimicking+PFI", "GID"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    plain, last = Bench(args.pair), Bench(args.pair)
    rows = []
    with EventStorage(PAST_WARM_UPS):
        for variant in (PLAIN, WHOLE, *args.methods):
            steps = plain.step(variant), with_channels_last(last.step(variant))
            times = [[seconds(step.run_step) for step in steps] for _ in range(args.rounds + 1)][1:]
            ratios = [after / before for before, after in times]
            medians = [statistics.median(column) for column in zip(*times, strict=True)]
            rows.append([variant, *medians, statistics.median(ratios), min(ratios), max(ratios)])
    print(f"{args.pair}, {device_name(args.threads)}, torch {torch.__version__}, {args.rounds} rounds")
    headers = ["", "s / iteration", "channels last", "ratio", "lowest", "highest"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".3f", ".3f", ".3f", ".3f", ".3f"), tablefmt="github"))


if __name__ == "__main__":
    main()
