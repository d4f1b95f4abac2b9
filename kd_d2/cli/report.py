"""Write one self-contained HTML page about trainings, analyses and a sweep.

kd-d2 report --output PAGE.html [--title TITLE] [--sweep MATRIX.yaml --results DIR] [DIR ...]

DIR is the output folder of a training (scores by class, curves, cost, config) or of kd-d2 analyze (tables, pictures). A
sweep adds its table with spreads, curves, settings and versions. The page opens from disk and needs no network.
"""

from __future__ import annotations

import argparse

from ..arguments import add_import_argument
from ..errors import UserError
from ..extensions import import_extensions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", metavar="DIR", help="output folder of a training or an analysis")
    parser.add_argument("--output", required=True, metavar="PAGE.html", help="the page")
    parser.add_argument("--title", default="Distilled detectors", help="title of the page")
    parser.add_argument("--sweep", metavar="MATRIX.yaml", help="YAML file of a sweep, or the name of a shipped one")
    parser.add_argument("--results", metavar="DIR", help="folder of the sweep's results")
    add_import_argument(parser)


def run(args: argparse.Namespace) -> None:
    from ..analysis.base import is_analysis, load_analysis
    from ..config_files import find_config_file
    from ..files import check_output_file, temporary_folder, write_text
    from ..report import render
    from ..report.sections import is_run, run_section, sweep_section
    from ..sweep import read_matrix
    from ..versions import versions

    if args.opts:
        raise UserError(f"kd-d2 report takes no config overrides, such as {args.opts[0]}.")
    if (args.sweep is None) != (args.results is None):
        raise UserError("--sweep and --results must be given together: the sweep's YAML file and its results folder.")
    if not args.sweep and not args.folders:
        raise UserError("There is nothing to report; give output folders of trainings or analyses, or a --sweep.")
    import_extensions(args.imports)
    sections = []
    with temporary_folder() as scratch:
        if args.sweep:
            sections.append(
                sweep_section(read_matrix(find_config_file(args.sweep, "the sweep")), args.results, scratch)
            )
        for folder in args.folders:
            if is_analysis(folder):
                sections.append(load_analysis(folder).section())
            elif is_run(folder):
                sections.append(run_section(folder, scratch))
            else:
                raise UserError(
                    f"{folder} is neither the output folder of a training (it has no config.yaml and metrics.json) "
                    "nor that of a finished kd-d2 analyze (it has no analysis.json)."
                )
        page = render(args.title, sections, versions())
    check_output_file(args.output)
    write_text(args.output, page)
    print(f"{args.output}: {len(page.encode()) / 1e3:,.0f} kB")
