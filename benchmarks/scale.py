#!/usr/bin/env python
"""Seconds of an iteration on 1 to 64 devices, modelled from parts that are measured here, and checked on two processes.

    benchmarks/scale.py [--pair PAIR] [--method NAME[+NAME]] [--batch N] [--rounds N] [--bandwidth GB/s] [--latency US]

Measured: an iteration of one process; the backward pass; with two processes the same iteration, and the exchange (all-reduce) of as many gradients
alone. Each device has the batch of one. A ring of N devices moves 2 (N - 1) / N times the gradients through every link and waits 2 (N - 1) times for
a message. What of that is not hidden behind the backward pass is added: all of it at worst, at best what is longer than that pass. --bandwidth and --latency are
those between devices (default: as measured between two processes here). Two processes on a CPU take one thread each, as the one does.
"""

import argparse
import statistics
from collections.abc import Callable

from measuring import device_name, seconds
from step import PAIRS, PAST_WARM_UPS, Bench

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

DEVICES = (1, 2, 4, 8, 16, 32, 64)
SMALL_MESSAGE = 64  # elements


def median_seconds(call: Callable[[], object], rounds: int) -> float:
    return statistics.median([seconds(call) for _ in range(rounds + 1)][1:])


def iteration(pair: str, method: str, batch: int | None, rounds: int) -> tuple[float, int]:
    """Seconds of a process's iteration, alone or as one of several, and how many gradients it has."""
    step = Bench(pair, batch).step(method)
    number = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    if comm.get_world_size() > 1:
        step.model = DistributedDataParallel(step.model)
    with EventStorage(PAST_WARM_UPS):
        return median_seconds(step.run_step, rounds), number


def backward(pair: str, method: str, batch: int | None, rounds: int) -> float:
    """Seconds of the backward pass."""
    bench = Bench(pair, batch)
    model = bench.step(method).model
    times = []
    with EventStorage(PAST_WARM_UPS):
        for _ in range(rounds + 1):
            loss = sum(model(bench.data).values())
            times.append(seconds(loss.backward))
    return statistics.median(times[1:])


def of_two(pair: str, method: str, batch: int | None, rounds: int, results: list) -> None:
    """In each of two processes: seconds of an iteration, of the exchange of all gradients, and of a small one."""
    torch.set_num_threads(1)
    whole, number = iteration(pair, method, batch, rounds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exchanges = []
    for elements in (number, SMALL_MESSAGE):
        gradients = torch.zeros(elements, device=device)
        exchanges.append(median_seconds(lambda gradients=gradients: distributed.all_reduce(gradients), rounds))
    if comm.get_rank() == 0:
        results[:] = [whole, *exchanges]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--method", default="StructuralKD")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bandwidth", type=float, help="GB/s between devices")
    parser.add_argument("--latency", type=float, help="microseconds of a message between devices")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = args.pair, args.method, args.batch, args.rounds
    one, number = iteration(*options)
    behind = backward(*options)
    with torch.multiprocessing.Manager() as manager:
        results = manager.list()
        launch(of_two, 2, dist_url="auto", args=(*options, results))
        two, exchange, small = results
    size = 4 * number
    latency = small / 2 if args.latency is None else args.latency / 1e6
    rate = size / max(exchange - small, 1e-9) if args.bandwidth is None else args.bandwidth * 1e9

    rows = []
    for devices in DEVICES:
        through = 2 * (devices - 1) / devices * size / rate + 2 * (devices - 1) * latency
        best, worst = one + max(0.0, through - behind), one + through
        rows.append([devices, through, best, worst, one / worst, two if devices == 2 else None])
    print(
        f"{args.pair}, {args.method}, {device_name(1)}, torch {torch.__version__}, {size / 2**20:.1f} MiB of gradients, backward pass {behind:.3f} s"
    )
    print(f"{rate / 1e9:.2f} GB/s, {latency * 1e6:.0f} us a message")
    headers = ["devices", "exchange s", "s / iteration, at best", "at worst", "efficiency, at worst", "measured"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".4f", ".3f", ".3f", ".3f", ".3f"), tablefmt="github"))


if __name__ == "__main__":
    main()
