"""The program kd-d2: one module of this package a command, imported only when it is the one that runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

from ..errors import exit_on_user_error
from .overrides import split_overrides

COMMANDS = {
    "train": "train a detector, plain or distilled",
    "eval": "evaluate a trained detector, or a teacher",
    "analyze": "analyze trained detectors: errors, robustness, features, ...",
    "report": "write an HTML page about trainings, analyses and sweeps",
}
"""By name what each does; `train` is the module kd_d2.cli.train, with `add_arguments(parser)` and `run(args)`.

A module may also have `prepare(options)`, which is called first.
"""


def main(argv: list[str] | None = None) -> None:
    """Run a command line; a UserError ends it with one sentence and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        _overview().parse_args(argv or ["--help"])
        return
    module = _module_of(argv[0])
    parser = argparse.ArgumentParser(
        prog=f"kd-d2 {argv[0]}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    with exit_on_user_error():
        options, opts = split_overrides(argv[1:])
        if hasattr(module, "prepare"):
            module.prepare(options)
        module.add_arguments(parser)
        module.run(parser.parse_args(options, argparse.Namespace(opts=opts)))


def _module_of(command: str) -> ModuleType:
    return importlib.import_module(f".{command.replace('-', '_')}", __name__)


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="kd-d2",
        usage="kd-d2 COMMAND [options] [KEY VALUE ...]",
        description="Knowledge distillation for object detection on Detectron2.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
        + "\n\nkd-d2 COMMAND --help has the options of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser
