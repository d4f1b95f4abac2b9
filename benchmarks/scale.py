#!/usr/bin/env python
"""Model time and memory per iteration on 1 to 64 devices from measurements here, and check it with two processes.

    benchmarks/scale.py [--pair PAIR] [--method NAME[+NAME]] [--batch N] [--rounds N] [--bandwidth GB/s] [--latency US]
    benchmarks/scale.py --of STEP.json [--method NAME[+NAME]] --bandwidth GB/s --latency US

Measured: an iteration and the backward pass of one process; and with two processes, an iteration and the all-reduce of
the gradients. The batch size per device is constant. In a ring of N devices, each link transfers 2 (N - 1) / N times
the gradients, with 2 (N - 1) message latencies. At worst, all of this adds to the iteration; at best, only what exceeds
the backward pass. --bandwidth and --latency are between devices (default: measured between two processes). On a CPU,
each process uses one thread. Memory is per device, models included; several devices add DistributedDataParallel's
gradient buffers. With --of, time and memory (without the models) are results of benchmarks/step.py from any machine.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from measuring import device_name, peak_memory, seconds
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


def iteration(pair: str, method: str, batch: int | None, rounds: int) -> tuple[float, float, int]:
    """Return seconds per iteration of this process, alone or as one of several, MiB, and the number of gradients.

    On a CPU, the memory is valid only in a fresh process.
    """

    def measure() -> None:
        nonlocal duration, number
        step = Bench(pair, batch).step(method)
        number = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        if comm.get_world_size() > 1:
            step.model = DistributedDataParallel(step.model)
        with EventStorage(PAST_WARM_UPS):
            duration = median_seconds(step.run_step, rounds)

    duration, number = 0.0, 0
    memory = peak_memory(measure)
    return duration, memory, number


def backward(pair: str, method: str, batch: int | None, rounds: int) -> float:
    """Return the seconds of the backward pass."""
    bench = Bench(pair, batch)
    model = bench.step(method).model
    times = []
    with EventStorage(PAST_WARM_UPS):
        for _ in range(rounds + 1):
            loss = sum(model(bench.data).values())
            times.append(seconds(loss.backward))
    return statistics.median(times[1:])


def of_two(pair: str, method: str, batch: int | None, rounds: int, results: list) -> None:
    """Measure in two processes: seconds and MiB per iteration, and seconds to all-reduce all gradients and a few."""
    torch.set_num_threads(1)
    whole, memory, number = iteration(pair, method, batch, rounds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exchanges = []
    for elements in (number, SMALL_MESSAGE):
        gradients = torch.zeros(elements, device=device)
        exchanges.append(median_seconds(lambda gradients=gradients: distributed.all_reduce(gradients), rounds))
    if comm.get_rank() == 0:
        results[:] = [whole, memory, *exchanges]


@dataclass
class Parts:
    """Inputs of the model: seconds, MiB, and number of gradients; NaN if not measured."""

    device: str
    one: float
    memory: float
    gradients: int
    backward: float = math.inf
    two: float = math.nan
    memory_of_two: float = math.nan
    exchange: float = math.nan
    latency: float = math.nan

    @property
    def size(self) -> int:
        """Size of the gradients in bytes."""
        return 4 * self.gradients


def measured_here(pair: str, method: str, batch: int | None, rounds: int) -> Parts:
    torch.set_num_threads(1)
    options = pair, method, batch, rounds
    one, memory, number = iteration(*options)
    behind = backward(*options)
    with torch.multiprocessing.Manager() as manager:
        results = manager.list()
        launch(of_two, 2, dist_url="auto", args=(*options, results))
        two, memory_of_two, exchange, small = results
    return Parts(device_name(1), one, memory, number, behind, two, memory_of_two, exchange - small, small / 2)


def measured_elsewhere(path: str, method: str) -> tuple[str, Parts]:
    """Return the pair and the parts of a result of benchmarks/step.py."""
    with open(path) as file:
        result = json.load(file)
    variant = result["variants"][method]
    parameters = Bench(result["pair"], 1).step(method).model.parameters()
    number = sum(p.numel() for p in parameters if p.requires_grad)
    batch = f", batch {result['batch']}" if "batch" in result else ""  # not in older results
    return result["pair"], Parts(
        result["device"] + batch,
        statistics.median(variant["seconds"]),
        variant["memory_mib"],
        number,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--method", default="StructuralKD")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--of", metavar="STEP.json", help="result of benchmarks/step.py to use instead of measurements")
    parser.add_argument("--bandwidth", type=float, help="GB/s between devices")
    parser.add_argument("--latency", type=float, help="microseconds per message between devices")
    args = parser.parse_args()
    if args.of:
        if args.bandwidth is None or args.latency is None:
            parser.error("--of needs --bandwidth and --latency")
        pair, parts = measured_elsewhere(args.of, args.method)
    elif torch.cuda.device_count() == 1:
        parser.error(
            "two processes need two GPUs, and PyTorch finds one; use --of, or hide it with CUDA_VISIBLE_DEVICES=''"
        )
    else:
        pair, parts = args.pair, measured_here(args.pair, args.method, args.batch, args.rounds)
    latency = parts.latency if args.latency is None else args.latency / 1e6
    rate = parts.size / max(parts.exchange, 1e-9) if args.bandwidth is None else args.bandwidth * 1e9

    rows = []
    for devices in DEVICES:
        through = 2 * (devices - 1) / devices * parts.size / rate + 2 * (devices - 1) * latency
        best, worst = parts.one + max(0.0, through - parts.backward), parts.one + through
        memory = parts.memory + (parts.size / 2**20 if devices > 1 else 0)
        rows.append([devices, through, best, worst, parts.one / worst, memory])
    print(
        f"{pair}, {args.method}, {parts.device}, {parts.size / 2**20:.1f} MiB of gradients, {rate / 1e9:.2f} GB/s, {latency * 1e6:.0f} us a message"
    )
    headers = ["devices", "exchange s", "s / iteration, at best", "at worst", "efficiency, at worst", "MiB"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".4f", ".3f", ".3f", ".3f", ".0f"), tablefmt="github"))
    if not args.of:
        print(
            f"Measured: backward pass {parts.backward:.3f} s; of two {parts.two:.3f} s / iteration, {parts.memory_of_two:.0f} MiB"
        )


if __name__ == "__main__":
    main()
