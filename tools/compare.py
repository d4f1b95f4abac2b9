#!/usr/bin/env python
"""Compare a teacher, a plain student and distilled students in one table: cells x seeds, resumable.

    tools/compare.py --matrix MATRIX.yaml --output DIR [--cells NAME ...] [--seeds N ...] [--jobs N] [KEY VALUE ...]

Every finished cell leaves a small <cell>-seed<N>.json in the folder of results; called again, only what is missing runs,
and a cell that was killed goes on from its last checkpoint. The overrides hold for all cells. With --readme the table takes
the place of the one between the lines "<!-- table of tools/compare.py -->" and "<!-- end of the table -->" of a Markdown file;
a file with several has "<!-- table of tools/compare.py: NAME -->" above each and is given as FILE#NAME.
"""

import argparse

from kd_d2.errors import exit_on_user_error
from kd_d2.sweep import compare, read_matrix


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", required=True, help="yaml file of the matrix")
    parser.add_argument("--output", required=True, help="folder of the runs")
    parser.add_argument("--results", help="folder of finished cells (default OUTPUT/results)")
    parser.add_argument("--report", help="folder of table and plots (default that of --results)")
    parser.add_argument("--readme", metavar="FILE[#NAME]", help="a Markdown file whose marked table becomes this one")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--cells", nargs="+", help="only these cells, beside baseline and plain student in the table")
    parser.add_argument("--seeds", nargs="+", help="only these seeds")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default 1)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    args = parser.parse_args(argv)
    for name in ("cells", "seeds"):  # a list takes all that follows, overrides too
        values, overrides = _until_override(getattr(args, name))
        setattr(args, name, values)
        args.opts = [*overrides, *args.opts]
    try:
        args.seeds = args.seeds and [int(seed) for seed in args.seeds]
    except ValueError:
        parser.error(f"argument --seeds: {' '.join(args.seeds)} are not whole numbers")
    return args


def _until_override(values: list[str] | None) -> tuple[list[str] | None, list[str]]:
    """The values up to the first KEY.LIKE.THIS, and the rest."""
    keys = [i for i, value in enumerate(values or ()) if value.isupper() and "." in value]
    return (values[: keys[0]], values[keys[0] :]) if keys else (values, [])


if __name__ == "__main__":
    args = parse()
    with exit_on_user_error():
        compare(
            read_matrix(args.matrix),
            args.output,
            args.opts,
            results=args.results,
            report=args.report,
            readme=args.readme,
            report_only=args.report_only,
            cells=args.cells,
            seeds=args.seeds,
            jobs=args.jobs,
            threads=args.threads,
        )
