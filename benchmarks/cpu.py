#!/usr/bin/env python
"""Measure seconds per iteration on a CPU with CHANNELS_LAST for student and teacher, and also with bfloat16 SOLVER.AMP.

    benchmarks/cpu.py [--pair tiny|coco] [--methods NAME[+NAME] ...] [--rounds N] [--threads N]

Each variant of benchmarks/step.py alternates between the defaults, channels last and both. Ratios are within a round.
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

LAYOUTS = {
    "as it is": torch.contiguous_format,
    "channels last": torch.channels_last,
    "and bfloat16": torch.channels_last,
}


def laid_out(step: DistillationStep, memory_format: torch.memory_format) -> DistillationStep:
    step.model.to(memory_format=memory_format)
    if isinstance(step.model, KDMetaArch):
        step.model.teacher.model.to(memory_format=memory_format)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--methods", nargs="+", default=["StructuralKD", "ICD", "RankMimicking+PFI", "GID"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.pair)
    variants = [PLAIN, WHOLE, *args.methods]
    steps = {variant: {name: bench.step(variant) for name in LAYOUTS} for variant in variants}
    for by_name in steps.values():
        by_name["and bfloat16"].autocast = torch.bfloat16
    times: dict[str, dict[str, list[float]]] = {v: {name: [] for name in LAYOUTS} for v in variants}
    with EventStorage(PAST_WARM_UPS):
        for number in range(args.rounds + 1):
            for name, memory_format in LAYOUTS.items():
                for variant in variants:  # all share the student, whose layout changes once per round
                    times[variant][name].append(seconds(laid_out(steps[variant][name], memory_format).run_step))
            print(f"round {number}", flush=True)
    rows = []
    for variant, by_name in times.items():
        measured = {name: values[1:] for name, values in by_name.items()}
        row = [variant, *(statistics.median(values) for values in measured.values())]
        for name in list(LAYOUTS)[1:]:
            ratios = [a / b for a, b in zip(measured[name], measured["as it is"], strict=True)]
            row += [statistics.median(ratios), f"{min(ratios):.2f}-{max(ratios):.2f}"]
        rows.append(row)
    print(
        f"{args.pair}, {device_name(args.threads)}, torch {torch.__version__}, median of {args.rounds} interleaved rounds"
    )
    headers = ["s / iteration", *LAYOUTS, "ratio", "range", "ratio", "range"]
    print(tabulate(rows, headers=headers, floatfmt=("", *[".3f"] * 4, "", ".3f", ""), tablefmt="github"))


if __name__ == "__main__":
    main()
