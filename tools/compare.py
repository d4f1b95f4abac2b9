#!/usr/bin/env python
"""Compare a teacher, a plain student and distilled students in one table: cells x seeds, resumable.

    tools/compare.py --matrix MATRIX.yaml --output DIR [--cells NAME ...] [--seeds N ...] [--jobs N] [KEY VALUE ...]

Every finished cell leaves a small <cell>-seed<N>.json in the folder of results; called again, only what is missing runs,
and a cell that was killed goes on from its last checkpoint. The overrides hold for all cells.
"""

import argparse
import sys

from kd_d2 import UserError
from kd_d2.comparison import compare, read_matrix


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", required=True, help="yaml file of the matrix")
    parser.add_argument("--output", required=True, help="folder of the runs")
    parser.add_argument("--results", help="folder of finished cells, table and plots (default OUTPUT/results)")
    parser.add_argument("--cells", nargs="+", help="only these cells")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default 1)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse()
    try:
        compare(
            read_matrix(args.matrix),
            args.output,
            args.opts,
            results=args.results,
            cells=args.cells,
            seeds=args.seeds,
            jobs=args.jobs,
            threads=args.threads,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
