"""Look at configs.

kd-d2 config list                                            the names of the configs that ship
kd-d2 config show CONFIG [--changes] [KEY VALUE ...]         a config with all its bases and overrides
"""

from __future__ import annotations

import argparse
import os
import sys

from ..extensions import import_extensions
from .arguments import add_config_argument, add_import_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="print the names of the configs that ship")
    show = actions.add_parser("show", help="print a config with all its bases and overrides, as yaml")
    add_config_argument(show)
    show.add_argument(
        "--changes", action="store_true", help="only the keys that are not at their defaults, one per line"
    )
    add_import_argument(show)


def run(args: argparse.Namespace) -> None:
    from ..config import changed_keys, read_config
    from ..config_files import shipped_configs

    if args.action == "list":
        _print("\n".join(shipped_configs()))
        return
    import_extensions(args.imports)
    cfg = read_config(args.config_file, args.opts)
    if args.changes:
        _print("\n".join(f"{key}: {value!r}" for key, value in changed_keys(cfg).items()))
    else:
        _print(cfg.dump().rstrip())


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `kd-d2 config list | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
