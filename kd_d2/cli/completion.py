"""Print a completion script for a shell; needs the package shtab (pip install 'kd_d2[completion]').

bash, for example in ~/.bashrc:

    source <(kd-d2 completion bash)

zsh, with a folder DIR of $fpath:

    kd-d2 completion zsh > DIR/_kd-d2
"""

from __future__ import annotations

import argparse
import re

from ..errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"])


def run(args: argparse.Namespace) -> None:
    from . import COMMANDS, module_of
    from .analyze import AnalysisParser

    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError("kd-d2 completion needs the package shtab: pip install 'kd_d2[completion]'.") from error
    parser = argparse.ArgumentParser(prog="kd-d2")
    commands = parser.add_subparsers()
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        module_of(name).add_arguments(command)
        for analysis in _subcommands(command):
            if isinstance(analysis, AnalysisParser):
                analysis.add_options()
    _complete_files(parser)
    print(_with_options_everywhere(shtab.complete(parser, args.shell)))


def _with_options_everywhere(script: str) -> str:
    """Let bash complete a word that starts with "-" as an option also where the value of another option may follow."""
    return re.sub(
        r'("\$completing_word" == -\*) &&\s+\( -z "\$current_action_compgen" [^\n]+ \) \]\]', r"\1 ]]", script
    )


def _subcommands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    groups = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [command for group in groups for command in group]


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Complete every argument without choices as a path."""
    for command in _subcommands(parser):
        _complete_files(command)
    for action in parser._actions:
        if action.nargs != 0 and action.choices is None and action.type is None:
            action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}
