#!/usr/bin/env python
"""Measure the cost of MODEL.KD.BALANCE: iterations without it, with it, and with a measurement of gradient ratios.

    benchmarks/balance.py [--pair PAIR] [--methods NAME[+NAME] ...] [--levels] [--rounds N] [--threads N]

The three alternate in one process, round after round. The columns are medians in seconds; on a CPU, in CPU seconds of the
process. "cost" is that of the balance at the default PERIOD, relative to the iteration without it in the same round: of
an iteration between measurements, and of the measurement divided by PERIOD (median, lowest and highest of the rounds).
The pairs are those of benchmarks/step.py.
"""

import argparse
import statistics

from kd_d2.balance import GradientBalance
from kd_d2.level_balance import LevelBalance
from measuring import busy_seconds, device_name
from step import PAIRS, PAST_WARM_UPS, Bench

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

ONCE = 10 * PAST_WARM_UPS
"""A period in which no iteration of the benchmark is due, except the first for each method."""


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
            steps = [bench.step(method) for _ in range(3)]
            for step, every in zip(steps[1:], (ONCE, 1), strict=True):
                levels = LevelBalance(0.9) if args.levels else None
                step.model.balance = GradientBalance(target=2.0, period=every, levels=levels)
            rounds = []
            for _ in range(args.rounds + 1):
                storage.iter += 1
                rounds.append([busy_seconds(step.run_step) for step in steps])
            rounds = rounds[1:]  # the first one warms up, and both balances measure
            medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
            costs = [(between - none + (measuring - between) / period) / none for none, between, measuring in rounds]
            rows.append([method, *medians, statistics.median(costs), min(costs), max(costs)])
    print(f"{args.pair}, {device_name(args.threads)}, torch {torch.__version__}, {args.rounds} rounds, PERIOD {period}")
    headers = ["", "without", "between measurements", "with measurement", "cost", "lowest", "highest"]
    print(tabulate(rows, headers=headers, floatfmt=("", *[".4f"] * 6), tablefmt="github"))


if __name__ == "__main__":
    main()
