#!/usr/bin/env python
"""Number of operators in a training iteration, each of which launches at least one kernel on a GPU.

    benchmarks/operators.py [--pair PAIR] [--methods NAME[+NAME] | recommended/NAME ...] [--output FILE.json]

PyTorch operators that compute or copy are counted in the forward and the backward pass, not views and allocations. The numbers of a
method are those in addition to "student + teacher's neck" or "student + teacher", see step.py. They depend on the detectors, not on the
machine or the image size. On a GPU, StructuralKD replaces most of its operators with its own kernels.
"""

import argparse
import json

from step import PAIRS, PAST_WARM_UPS, Bench

from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

WITHOUT_KERNEL = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "promote_types",
}
IMAGES = 2


class OperatorCount(TorchDispatchMode):
    """Counts the operators that run inside the context.

    Attributes:
        number: how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view and function.overloadpacket.__name__ not in WITHOUT_KERNEL
        return function(*args, **(kwargs or {}))


def count_operators(bench: Bench, variant: str) -> tuple[int, int]:
    """Operators of the forward and of the backward pass in the second iteration of a variant."""
    model = bench.model(variant).train()
    with EventStorage(PAST_WARM_UPS):
        sum(model(bench.data).values()).backward()
        model.zero_grad()
        with OperatorCount() as count:
            losses = model(bench.data)
            forward = count.number
            sum(losses.values()).backward()
    return forward, count.number - forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--methods", nargs="+", help="as of step.py (default all methods that go with the pair)")
    parser.add_argument("--output", help="json file for the figures")
    args = parser.parse_args()
    bench = Bench(args.pair, IMAGES)
    counts = {v: count_operators(bench, v) for v in bench.references}
    for method in args.methods or bench.methods():
        reference = counts[bench.reference_of(method)]
        counts[method] = tuple(n - r for n, r in zip(count_operators(bench, method), reference, strict=True))
    rows = [[variant, *of, sum(of)] for variant, of in counts.items()]
    print(tabulate(rows, ["", "forward", "backward", "both"], tablefmt="github"))
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"pair": args.pair, "operators": counts}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
