"""Train the cells of a sweep with several seeds, and compare teacher, plain and distilled students in one table.

kd-d2 sweep SWEEP.yaml --output DIR [--cells NAME ...] [--seeds N ...] [--jobs N] [KEY VALUE ...]

Every finished training writes a small JSON file to the results folder. A restarted sweep runs only missing trainings
and resumes interrupted ones from their last checkpoints. The overrides apply to all cells. With --readme, the table
replaces the one between the lines "<!-- table of kd-d2 sweep -->" and "<!-- end of the table -->" of a Markdown file.
For a file with several tables, "<!-- table of kd-d2 sweep: NAME -->" is selected with FILE#NAME.
"""

from __future__ import annotations

import argparse

from ..arguments import add_import_argument
from ..extensions import import_extensions
from .log import print_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="file of the cells, or the name of a shipped one")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the trainings")
    parser.add_argument("--results", metavar="DIR", help="folder for finished cells (default OUTPUT/results)")
    parser.add_argument("--report", metavar="DIR", help="folder for table and plots (default: that of --results)")
    parser.add_argument("--readme", metavar="FILE[#NAME]", help="Markdown file whose marked table is replaced")
    parser.add_argument("--report-only", action="store_true", help="report finished trainings without running any")
    parser.add_argument(
        "--cells", nargs="+", metavar="NAME", help="train only these; baseline and plain student stay in the table"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="only these seeds")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="number of parallel trainings (default: one for each of --gpus, or 1)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads per training (default 1)")
    parser.add_argument(
        "--gpus",
        nargs="+",
        default=(),
        metavar="ID",
        help="GPUs to distribute the trainings over, one each, as in CUDA_VISIBLE_DEVICES",
    )
    add_import_argument(parser)


def run(args: argparse.Namespace) -> None:
    from ..config_files import find_config_file
    from ..sweep import SweepOptions, read_matrix, run_sweep

    print_log()
    import_extensions(args.imports)
    matrix = read_matrix(find_config_file(args.sweep, "the sweep"))
    names = SweepOptions.__dataclass_fields__
    run_sweep(matrix, args.output, args.opts, SweepOptions(**{n: v for n, v in vars(args).items() if n in names}))
