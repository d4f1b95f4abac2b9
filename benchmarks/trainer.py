#!/usr/bin/env python
"""Measure seconds per iteration of a plain detector with Detectron2's DefaultTrainer and kd_d2's, with data loading.

    benchmarks/trainer.py [--rounds N] [--iterations N] [--threads N]

Both train the student of configs/tiny on the same synthetic dataset, and alternate every few iterations in one process.
Ratios are within a round. kd_d2's trainer runs with Detectron2's memory format, and with its own default.
"""

import argparse
import os
import statistics
import tempfile

from kd_d2 import load_config
from kd_d2.data import register_synthetic
from kd_d2.engine.trainer import KDTrainer
from measuring import device_name, seconds

import torch
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from tabulate import tabulate

CONFIG = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "tiny", "retinanet-student.yaml"
)
REFERENCE = "Detectron2's trainer"
TRAINERS = {
    REFERENCE: (DefaultTrainer, []),
    "kd_d2's trainer": (KDTrainer, ["SOLVER.CHANNELS_LAST", False]),
    "kd_d2's trainer, default": (KDTrainer, []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=5, help="iterations of each trainer per round")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register_synthetic()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, (trainer, keys) in TRAINERS.items():
            options = ["MODEL.DEVICE", device, "MODEL.META_ARCHITECTURE", "RetinaNet", "OUTPUT_DIR", folder, *keys]
            cfg = load_config(CONFIG, options)
            trainers[name] = trainer(cfg)
            trainers[name].resume_or_load(resume=False)
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(args.rounds + 1):
            for name, trainer in trainers.items():
                with EventStorage(number * args.iterations) as storage:

                    def run(trainer=trainer, storage=storage) -> None:
                        for trainer.iter in range(storage.iter, storage.iter + args.iterations):
                            trainer.run_step()
                            storage.step()

                    times[name].append(seconds(run) / args.iterations)
    times = {name: values[1:] for name, values in times.items()}
    ratios = {name: [a / b for a, b in zip(values, times[REFERENCE], strict=True)] for name, values in times.items()}
    rows = [
        [n, statistics.median(times[n]), statistics.median(ratios[n]), min(ratios[n]), max(ratios[n])] for n in times
    ]
    print(
        f"tiny student, {device_name(args.threads)}, torch {torch.__version__}, {args.rounds} interleaved rounds of {args.iterations} iterations"
    )
    print(
        tabulate(rows, headers=["", "s / iteration", "ratio", "lowest", "highest"], floatfmt=".3f", tablefmt="github")
    )


if __name__ == "__main__":
    main()
