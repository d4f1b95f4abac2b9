"""Analyze trained detectors and distillations.

kd-d2 analyze ANALYSIS --model [TITLE=]CONFIG_OR_RUN [WEIGHTS] [--model ...] --output DIR [options] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import Any

from ..analysis import ANALYSES, find_analysis
from ..arguments import HelpFormatter, Parser, add_import_argument, add_model_argument
from ..errors import UserError
from ..extensions import import_extensions

COUNTS = {(1, 1): "one", (1, None): "one or more", (2, None): "two or more"}


def prepare(options: list[str]) -> None:
    """Import the values of --import, so that the analyses that they register are available."""
    parser = Parser(prog="kd-d2 analyze", add_help=False)
    add_import_argument(parser)
    import_extensions(parser.parse_known_args(options)[0].imports)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_import_argument(parser, dest="imports_before_analysis")
    commands = parser.add_subparsers(
        dest="analysis", required=True, metavar="ANALYSIS", title="analyses", parser_class=AnalysisParser
    )
    for name, entry in ANALYSES.items():
        commands.add_parser(name, help=entry.help, analysis=name)


class AnalysisParser(Parser):
    """Parser of one analysis, which is imported only when it is selected."""

    def __init__(self, *, analysis: str, **keywords: Any):
        super().__init__(formatter_class=HelpFormatter, **keywords)
        self.analysis = analysis

    def add_options(self) -> None:
        """Import the analysis and add its options."""
        analysis = find_analysis(self.analysis)
        self.description = inspect.getdoc(analysis)
        add_model_argument(self, COUNTS.get(analysis.model_count, "several"))
        self.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
        add_import_argument(self)
        analysis.add_arguments(self)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        self.add_options()
        analysis = find_analysis(self.analysis)
        known, rest = super().parse_known_args(args, namespace)
        known.options = {name: value for name, value in vars(known).items() if name not in ("model", "output")}
        if "imports" not in inspect.signature(analysis.run).parameters:  # which an analysis that starts processes needs
            del known.options["imports"]
        return known, rest


def run(args: argparse.Namespace) -> None:
    analysis = find_analysis(args.analysis)
    least, most = analysis.model_count
    if not least <= len(args.model) <= (most or len(args.model)):
        raise UserError(
            f"--model: kd-d2 analyze {args.analysis} takes {COUNTS.get(analysis.model_count, f'{least} to {most}')} of them, "
            f"not {len(args.model)}."
        )
    if "imports" in args.options:
        args.options["imports"] = [*args.imports_before_analysis, *args.options["imports"]]
    from detectron2.utils import comm

    result = analysis.run(analysis.read_models(args.model, args.opts), args.output, **args.options)
    if comm.is_main_process():
        result.save(args.output)
        print(f"{result.summary()}\nThe results are in {args.output}".lstrip(), flush=True)
