"""Config overrides at the end of a command line: KEY VALUE ... or KEY=VALUE ..."""

from __future__ import annotations

import re

from ..errors import UserError

_NODES = "DATALOADER|DATASETS|GLOBAL|INPUT|MODEL|SOLVER|TEST"
_TOP_LEVEL_KEYS = "CUDNN_BENCHMARK|FLOAT32_PRECISION|OUTPUT_DIR|SEED|VERSION|VIS_PERIOD"
_OVERRIDE = re.compile(rf"((?:{_NODES})(?:\.[A-Z0-9_]+)+|{_TOP_LEVEL_KEYS})(?:=(.*))?", re.DOTALL)


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into options and overrides, which are alternating keys and values.

    The overrides begin with the first argument that has the form of a config key, such as SOLVER.BASE_LR.

    Raises:
        UserError: an option follows an override, or a key has no value.
    """
    first = next((number for number, argument in enumerate(argv) if _OVERRIDE.fullmatch(argument)), len(argv))
    options, rest, overrides = argv[:first], argv[first:], []
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--"):
            raise UserError(f"The option {argument} must come before the KEY VALUE overrides.")
        match = _OVERRIDE.fullmatch(argument)
        if match and match[2] is not None:
            overrides += [match[1], match[2]]
        elif rest:
            overrides += [argument, rest.pop(0)]
        else:
            raise UserError(f"The override {argument} has no value: overrides are KEY VALUE pairs, or KEY=VALUE.")
    return options, overrides
