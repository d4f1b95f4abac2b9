"""Print and explain configs.

kd-d2 config list
kd-d2 config show CONFIG [--changes] [KEY VALUE ...]
kd-d2 config explain KEY_OR_NODE, such as MODEL.KD.ICD or SOLVER.AMP.DTYPE
"""

from __future__ import annotations

import argparse

from ..arguments import add_config_argument, add_import_argument
from ..extensions import import_extensions

WITHOUT_OVERRIDES = ("explain",)
"""Actions whose arguments may look like overrides."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="print the names of shipped configs and sweeps")
    show = actions.add_parser("show", help="print a config with all its bases and overrides, as YAML")
    add_config_argument(show)
    show.add_argument("--changes", action="store_true", help="print only keys with non-default values, one per line")
    add_import_argument(show)
    explain = actions.add_parser("explain", help="print type, default and meaning of a key, or of all keys of a node")
    explain.add_argument("key", metavar="KEY_OR_NODE", help="a config key, or a node such as MODEL.KD.ICD")
    add_import_argument(explain)


def run(args: argparse.Namespace) -> None:
    if args.action == "list":
        from ..config_files import shipped_configs

        print("\n".join(shipped_configs()))
        return
    from ..config import changed_keys, read_config

    import_extensions(args.imports)
    if args.action == "explain":
        from ..reference import explain

        print(explain(args.key))
        return
    cfg = read_config(args.config_file, args.opts)
    if args.changes:
        print("\n".join(f"{key}: {value!r}" for key, value in changed_keys(cfg).items()))
    else:
        print(cfg.dump().rstrip())
