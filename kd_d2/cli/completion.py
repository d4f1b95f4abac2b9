"""Print a completion script for a shell; needs the package shtab (pip install kd_d2[completion]).

bash:  source <(kd-d2 completion bash)
zsh:   kd-d2 completion zsh > a folder of $fpath/_kd-d2
"""

from __future__ import annotations

import argparse

from ..errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"])


def run(args: argparse.Namespace) -> None:
    from . import COMMANDS, module_of

    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError("kd-d2 completion needs the package shtab: pip install 'kd_d2[completion]'.") from error
    parser = argparse.ArgumentParser(prog="kd-d2")
    commands = parser.add_subparsers()
    for name, summary in COMMANDS.items():
        module_of(name).add_arguments(commands.add_parser(name, help=summary))
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Complete every argument without choices as a path."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.nargs != 0 and action.choices is None and action.type is None:
            action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}
