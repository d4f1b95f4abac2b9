#!/usr/bin/env python
"""Measure the cost of MODEL.KD.BALANCE: an iteration that measures gradient ratios compared to one that does not.

    benchmarks/balance.py [--pair PAIR] [--methods NAME[+NAME] ...] [--levels] [--rounds N] [--threads N]

Both alternate in one process, round after round. "measurement" is the difference of their medians. "of iteration" is
the relative cost at the default PERIOD: the difference in the same round, divided by PERIOD and by the iteration
without measurement (median, lowest and highest of the rounds). The pairs are those of benchmarks/step.py.
"""

import argparse
import statistics

from kd_d2.balance import GradientBalance
from kd_d2.level_balance import LevelBalance
from measuring import device_name, seconds
from step import PAIRS, PAST_WARM_UPS, Bench

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--methods", nargs="+", help="methods, joined by + (default all that support the pair)")
    parser.add_argument("--levels", action="store_true", help="with MODEL.KD.BALANCE.LEVELS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    bench = Bench(args.pair)
    period = bench.cfg.MODEL.KD.BALANCE.PERIOD
    rows = []
    with EventStorage(PAST_WARM_UPS) as storage:
        for method in args.methods or bench.methods():
            without, measuring = bench.step(method), bench.step(method)
            measuring.model.balance = GradientBalance(
                target=2.0, period=1, levels=LevelBalance(0.9) if args.levels else None
            )
            pairs = []
            for _ in range(args.rounds + 1):
                storage.iter += 1
                pairs.append([seconds(step.run_step) for step in (without, measuring)])
            medians = [statistics.median(column) for column in zip(*pairs[1:], strict=True)]
            parts = [(after - before) / before / period for before, after in pairs[1:]]
            rows.append([method, *medians, medians[1] - medians[0], statistics.median(parts), min(parts), max(parts)])
    print(f"{args.pair}, {device_name(args.threads)}, torch {torch.__version__}, {args.rounds} rounds, PERIOD {period}")
    headers = ["", "s / iteration", "with measurement", "measurement", "of iteration", "lowest", "highest"]
    print(tabulate(rows, headers=headers, floatfmt=("", *[".4f"] * 6), tablefmt="github"))


if __name__ == "__main__":
    main()
