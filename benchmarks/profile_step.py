#!/usr/bin/env python
"""Profile an iteration of distillation by part (teacher, student, each method, backward, optimizer) and by operator.

    benchmarks/profile_step.py [--pair PAIR] [--batch N] [--methods NAME ...] [--iterations N] [--threads N] [--trace FILE.json]

The pairs are those of benchmarks/step.py. On a GPU, times are device times, and synchronizations are listed too.
--trace writes a timeline for chrome://tracing and Perfetto.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence

from kd_d2.engine.step import DistillationStep
from measuring import device_name
from step import PAIRS, PAST_WARM_UPS, Bench

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

BACKWARD = "backward"
OPERATORS = 12  # rows of the tables of operators and of kernels
WAITS = ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::nonzero")


def labelled(name: str, function: Callable) -> Callable:
    def call(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def labelled_backward() -> Iterator[None]:
    backward = torch.Tensor.backward
    torch.Tensor.backward = labelled(BACKWARD, backward)
    try:
        yield
    finally:
        torch.Tensor.backward = backward


def label(step: DistillationStep) -> list[str]:
    """Label the parts of the step for the profiler, and return the labels in order."""
    model = step.model
    model.teacher.adapter.run = labelled("teacher", model.teacher.adapter.run)
    model.adapter.run = labelled("student and its losses", model.adapter.run)
    for name, distiller in model.distillers.items():
        distiller.forward = labelled(name, distiller.forward)
    for optimizer in (step.optimizer, *(other.optimizer for other in step.auxiliary.values())):
        optimizer.step = labelled("optimizer", optimizer.step)
    return ["teacher", "student and its losses", *model.distillers, BACKWARD, "optimizer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--batch", type=int, help="images per iteration (default that of the pair)")
    parser.add_argument("--methods", nargs="+", help="default: all methods that support the pair")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trace", help="JSON file for the timeline")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    bench = Bench(args.pair, args.batch)
    step = bench.step("+".join(args.methods or bench.methods()))
    names = label(step)
    has_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if has_gpu else [])
    with EventStorage(PAST_WARM_UPS), labelled_backward():
        step.run_step()
        step.run_step()
        with profile(activities=activities) as profiler:
            for _ in range(args.iterations):
                with record_function("iteration"):
                    step.run_step()
                if has_gpu:
                    torch.cuda.synchronize()
    if args.trace:
        profiler.export_chrome_trace(args.trace)

    print(f"{args.pair}, {device_name(args.threads)}, torch {torch.__version__}, {args.iterations} iterations")
    print_profile(profiler.key_averages(), names, args.iterations, has_gpu)


def print_profile(averages: Sequence[FunctionEventAvg], names: list[str], iterations: int, has_gpu: bool) -> None:
    """Print the tables of parts, operators and kernels.

    On a GPU, a part's time is that of the kernels launched within its label. The backward pass launches them from
    another thread, so that it is part of the rest.
    """
    total, own = (
        ("device_time_total", "self_device_time_total") if has_gpu else ("cpu_time_total", "self_cpu_time_total")
    )
    # The profiler also lists each label as an event of the GPU, with the time from its first to its last kernel.
    events = {event.key: event for event in averages if event.device_type == DeviceType.CPU}
    kernels = [event for event in averages if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    whole = sum(getattr(event, own) for event in kernels) if has_gpu else getattr(events["iteration"], total)
    labels = [name for name in names if name in events and not (has_gpu and name == BACKWARD)]
    parts = [[name, getattr(events[name], total)] for name in labels]
    parts.append([f"{BACKWARD} and all else" if has_gpu else "all else", whole - sum(time for _, time in parts)])
    parts.append(["iteration", whole])
    print_shares("part", parts, whole, iterations)
    operators = [event for key, event in events.items() if key not in (*names, "iteration")]
    operators.sort(key=lambda event: -getattr(event, own))
    print_shares("operator", [[e.key, getattr(e, own)] for e in operators[:OPERATORS]], whole, iterations)
    if has_gpu:
        kernels.sort(key=lambda event: -getattr(event, own))
        print_shares("kernel", [[e.key[:90], getattr(e, own)] for e in kernels[:OPERATORS]], whole, iterations)
        wall = events["iteration"].cpu_time_total
        print(f"{wall / 1000 / iterations:.1f} ms an iteration on the CPU, {len(kernels)} kinds of kernels\n")
        counts = [[name, events[name].count / iterations] for name in WAITS if name in events]
        print(tabulate(counts, headers=["wait for the device", "times an iteration"], tablefmt="github"))


def print_shares(what: str, rows: list[list], whole: float, iterations: int) -> None:
    """Print a table that converts microseconds of all iterations to milliseconds and percent per iteration."""
    table = [[name, time / 1000 / iterations, 100 * time / whole] for name, time in rows]
    print(tabulate(table, headers=[what, "ms", "%"], floatfmt=".1f", tablefmt="github"), end="\n\n")


if __name__ == "__main__":
    main()
