"""Command line arguments shared by several commands."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from typing import Any


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs and lines that start with kd-d2 to the terminal width; indented lines are kept unchanged."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def kind(line: str) -> str:
            return line if line.startswith("kd-d2 ") else "prose" if line[:1].strip() else ""

        blocks = ((of, "\n".join(lines)) for of, lines in itertools.groupby(text.splitlines(), key=kind))
        return "\n".join(
            textwrap.fill(block, width, subsequent_indent="" if of == "prose" else "    ") if of else block
            for of, block in blocks
        )


class Parser(argparse.ArgumentParser):
    """Parser of a command and of its subcommands, which does not accept abbreviated options."""

    def __init__(self, **keywords: Any):
        super().__init__(allow_abbrev=False, **keywords)


def add_config_argument(parser: argparse.ArgumentParser, help: str = "a config") -> None:
    """Add CONFIG as `args.config_file`."""
    parser.add_argument(
        "config_file",
        metavar="CONFIG",
        help=f"{help}: a file, the name of a shipped one (kd-d2 config list), or one in Detectron2's model zoo",
    )


def add_import_argument(parser: argparse.ArgumentParser, dest: str = "imports") -> None:
    """Add --import as the list `args.imports`, or that of another name."""
    parser.add_argument(
        "--import",
        dest=dest,
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="a Python module or file that registers methods or detectors; may be repeated",
    )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Detectron2's options for distributed processes."""
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs and processes per machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines (default 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="URL of the first process, such as tcp://HOST:PORT")
    add_rank_timeout_argument(parser)


def add_rank_timeout_argument(parser: argparse.ArgumentParser) -> None:
    """Add the timeout of ranks that wait for each other."""
    parser.add_argument(
        "--rank-timeout",
        type=float,
        default=30,
        metavar="MINUTES",
        help="end the program if ranks wait this long for another (default 30); must exceed the time in which the first rank scores an evaluation",
    )


def add_model_argument(parser: argparse._ActionsContainer, count: str, *, required: bool = True) -> None:
    """Add --model as `args.model`, with a list of values for each `--model`; see `kd_d2.model_paths`.

    Args:
        count: the number of models that the command takes, for the help text.
    """
    parser.add_argument(
        "--model",
        action="append",
        nargs="+",
        required=required,
        metavar=("[TITLE=]CONFIG_OR_RUN", "WEIGHTS"),
        help=f"a trained model ({count}): the output folder of a training, or a config and a checkpoint; the config of a distillation "
        "selects its student",
    )
