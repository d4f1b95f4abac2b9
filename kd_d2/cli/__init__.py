"""The command line program kd-d2; each command is a module of this package, imported only when it runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from types import ModuleType

from ..arguments import HelpFormatter, Parser
from ..cores import limit_threads
from ..errors import UserError, check_docstrings, exit_on_user_error
from .overrides import split_overrides

COMMANDS = {
    "convert": "convert a dataset to COCO JSON",
    "import-adelaidet": "import an FCOS trained with AdelaiDet, such as a teacher",
    "import-mmdet": "import a detector trained with MMDetection, such as a teacher",
    "import-torchvision": "import a detector of torchvision, such as a teacher",
    "data": "check datasets before training",
    "train": "train a detector, plain or distilled",
    "eval": "evaluate a trained detector, or a teacher",
    "predict": "detect objects in images and videos",
    "export": "export a detector to ONNX, TorchScript or OpenVINO",
    "benchmark": "measure the speed and size of detectors",
    "sweep": "train several methods and seeds, and compare them in a table",
    "analyze": "analyze trained detectors: errors, robustness, features, ...",
    "report": "write an HTML page about trainings, analyses and sweeps",
    "pseudo-label": "label training images with the teacher",
    "config": "print and explain configs",
    "demo": "run distillation end to end on synthetic data",
    "completion": "print a completion script for bash or zsh",
}
"""Commands by name; `train` is the module kd_d2.cli.train, with `add_arguments(parser)` and `run(args)`.

A module may list first arguments in `WITHOUT_OVERRIDES`, after which no argument is parsed as a config override. It may
also have `prepare(options)`, which is called first.
"""


def main(argv: list[str] | None = None) -> None:
    """Run a command line; on a UserError, print one sentence and exit with status 2."""
    limit_threads()
    argv = sys.argv[1:] if argv is None else argv
    command, *arguments = argv or ["--help"]
    if command.startswith("-"):
        _overview().parse_args([command])
    with exit_on_user_error():
        check_docstrings()
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else "kd-d2 --help lists all commands."
            raise UserError(f"kd-d2 has no command {command!r}; {hint}")
        module = module_of(command)
        parser = Parser(prog=f"kd-d2 {command}", description=module.__doc__, formatter_class=HelpFormatter)
        plain = bool(arguments) and arguments[0] in getattr(module, "WITHOUT_OVERRIDES", ())
        options, opts = (arguments, []) if plain else split_overrides(arguments)
        if hasattr(module, "prepare"):
            module.prepare(options)
        module.add_arguments(parser)
        args = parser.parse_args(options, argparse.Namespace(opts=opts))
        for name, words in (("config_file", "CONFIG"), ("teacher_of", "--teacher-of")):
            if getattr(args, name, None) == "":
                raise UserError(f"{words} is empty: name a config.")
        module.run(args)


def module_of(command: str) -> ModuleType:
    return importlib.import_module(f".{command.replace('-', '_')}", __name__)


def _overview() -> argparse.ArgumentParser:
    from .. import __version__

    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="kd-d2",
        usage="kd-d2 COMMAND [options] [KEY VALUE ...]",
        description="Knowledge distillation for object detection on Detectron2.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
        + "\n\nkd-d2 COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser
