"""Arguments that commands share."""

from __future__ import annotations

import argparse


def add_config_argument(parser: argparse.ArgumentParser, help: str = "a config") -> None:
    """CONFIG, which is `args.config_file`."""
    parser.add_argument(
        "config_file",
        metavar="CONFIG",
        help=f"{help}: a file, the name of one that ships (kd-d2 config list), or one in Detectron2's model zoo",
    )


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """--import, of which `args.imports` is the list."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="a Python module or file that registers methods or detectors; may be repeated",
    )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes run, and where: Detectron2's options."""
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs, and processes, of each machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="URL of the first process, such as tcp://HOST:PORT")
    add_rank_timeout_argument(parser)


def add_rank_timeout_argument(parser: argparse.ArgumentParser) -> None:
    """How long ranks wait for each other."""
    parser.add_argument(
        "--rank-timeout",
        type=float,
        default=30,
        metavar="MINUTES",
        help="a rank for which the others wait so long ends the program (default 30); it must be more than the first rank needs to evaluate",
    )


def add_model_argument(parser: argparse._ActionsContainer, count: str, *, required: bool = True) -> None:
    """--model, of which `args.model` is a list of value lists, one for each `--model`: see
    `kd_d2.model_paths`.

    Args:
        count: how many models the command takes, for the help.
    """
    parser.add_argument(
        "--model",
        action="append",
        nargs="+",
        required=required,
        metavar=("[TITLE=]CONFIG_OR_RUN", "WEIGHTS"),
        help="a trained model: the output folder of a training, or a config and a checkpoint; a distillation's config means "
        f"its student ({count})",
    )
