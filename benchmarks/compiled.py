#!/usr/bin/env python
"""Measure seconds per training iteration with and without SOLVER.COMPILE, in float32 and mixed precision.

    benchmarks/compiled.py [--pair tiny|coco] [--batch N] [--rounds N] [--threads N] [--precisions float32 bfloat16]

Uses the plain student of benchmarks/step.py in channels-last format, which SOLVER.COMPILE implies. Ratios are within a
round; "first" compiles.
"""

import argparse
import statistics

from kd_d2.compiled import compile_backbone
from measuring import device_name, seconds
from step import PAIRS, PAST_WARM_UPS, PLAIN, Bench

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--batch", type=int, help="images per iteration (default that of the pair)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.pair, args.batch)
    step = bench.step(PLAIN)
    backbone = step.model.backbone
    step.model.to(memory_format=torch.channels_last)
    forwards = {"as it is": backbone.forward}
    compile_backbone(step.model, "SOLVER.COMPILE", channels_last=True)
    forwards["compiled"] = backbone.forward

    rows = []
    for precision in args.precisions:
        step.autocast = PRECISIONS[precision]
        times: dict[str, list[float]] = {name: [] for name in forwards}
        with EventStorage(PAST_WARM_UPS):
            for _ in range(args.rounds + 2):
                for name, backbone.forward in forwards.items():
                    times[name].append(seconds(step.run_step))
        for name, (first, _, *values) in times.items():
            ratios = [a / b for a, b in zip(values, times["as it is"][2:], strict=True)]
            medians = statistics.median(values), statistics.median(ratios)
            rows.append([f"{precision}, {name}", *medians, min(ratios), max(ratios), first])
    print(f"{args.pair}, {device_name(args.threads)}, torch {torch.__version__}, {args.rounds} rounds")
    headers = ["", "s / iteration", "ratio", "lowest", "highest", "s, first"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".3f", ".3f", ".3f", ".3f", ".1f"), tablefmt="github"))


if __name__ == "__main__":
    main()
